"""ToolBench's files as published: three forms, real damage. All texts here were written for these tests."""
import json
import os
import time
from pathlib import Path

import pytest
import small

import data
import toolplay
from tools import UserError

WRAPPED = 'This is the subfunction for tool "x", you can use this tool.The description of this function is: "%s"'
FUNCTIONS = [{"name": "find_book_for_library", "description": WRAPPED % "Find a book.", "parameters": {"type": "object", "properties": {
                 "title": {"type": "string", "description": "its title", "example_value": "Emma"},
                 "is_id": {"type": "integer", "description": ""}}, "required": ["title"], "optional": ["is_id"]}},
             {"name": "Finish", "description": "End.",
              "parameters": {"type": "object",
                             "properties": {"return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
                                            "final_answer": {"type": "string"}},
                             "required": ["return_type"], "optional": []}}]


def call(name, arguments, content=None):
    return {"role": "assistant", "content": content, "function_call": {"name": name, "arguments": arguments}}


def finish(text="It is there.", kind="give_answer"):
    return call("Finish", json.dumps({"return_type": kind, "final_answer": text}))


def result(text, name="find_book_for_library"):
    return {"role": "function", "name": name, "content": json.dumps({"error": "", "response": text})}


def tree(*middle, end=None, **more):
    messages = [{"role": "system", "content": "You are AutoGPT"}, {"role": "user", "content": "\nFind Emma for me.\nBegin!\n"}, *middle,
                end or finish()]
    return {"win": True, "tree": {}, "forward_args": {}, "compare_candidates": [], "answer_generation": {
        "valid_data": True, "finish_type": "give_answer", "function": FUNCTIONS, "train_messages": [messages[:3], messages],
        "query": "Find Emma for me.", **more}}


def dialogue(*turns, functions=FUNCTIONS):
    start = [("system", f"You are AutoGPT.\nSpecifically, you have access to the following APIs: {functions!r}"),
             ("user", "\nFind Emma for me.\nBegin!\n")]
    return {"id": "Step 1: Find Emma", "conversations": [{"from": who, "value": text} for who, text in [*start, *turns]]}


LLAMA_END = ("assistant", 'Thought: I know.\nAction: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "It is there."}')
INSTRUCTION = {"query": "Find Emma", "query_id": 7, "relevant APIs": [["Library", "Find Book"]], "api_list": [{
    "category_name": "Books", "tool_name": "City Library (v2)", "api_name": "2 Find-Book", "api_description": " Finds a book. ",
    "method": "GET",
    "required_parameters": [{"name": "from", "type": "DATE (YYYY-MM-DD)", "description": "first day", "default": ""},
                            {"name": "Max Count", "type": "NUMBER", "description": "", "default": 5}],
    "optional_parameters": [{"name": "verbose", "type": "BOOLEAN", "description": "", "default": ""}]}]}


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_an_answer_tree(tmp_path):
    item = tree(call("find_book_for_library", '{\n "title": "Emma",\n}', "I look it up."), result("shelf 3"),
                {"role": "user", "content": "Go on."})
    c, = data.read_toolbench(write(tmp_path, "a.json", item))
    assert [(m["role"], m["content"]) for m in c["messages"]] == [("user", "Find Emma for me."), ("assistant", "I look it up."),
                                                                  ("tool", '{"result": "shelf 3"}'), ("user", "Go on."),
                                                                  ("assistant", "It is there.")]
    assert c["messages"][1]["tool_calls"] == [{"name": "find_book_for_library", "arguments": {"title": "Emma"}}]
    # Finish is the answer, not a tool
    assert [t.signature() for t in c["tools"]] == ["find_book_for_library(title: string, is_id?: integer) - Find a book."]
    ids, mask = data.encode(c, small.tokenizer())
    trained = bytes(i for i, m in zip(ids, mask) if m and i < 256)
    assert sum(mask) and len(trained) > 50


def test_a_dialogue(tmp_path):
    turns = [("assistant", 'Thought: Look.\nAction: find_book_for_library\nAction Input: {"title": "Em\nma"}'),
             ("function", json.dumps({"error": "busy", "response": ""})), LLAMA_END]
    # a step of the dialogue, and a copy
    c, = data.read_toolbench(write(tmp_path, "toolllama.json", [dialogue(*turns), dialogue(*turns[:1]), dialogue(*turns)]))
    assert c["messages"][1] == {"role": "assistant", "content": "Look.",
                                "tool_calls": [{"name": "find_book_for_library", "arguments": {"title": "Em\nma"}}]}
    assert c["messages"][2]["content"] == '{"error": "busy"}' and c["messages"][-1]["content"] == "It is there."


def test_an_instruction_is_a_question_without_an_answer(tmp_path):
    tool = data.toolbench_api(INSTRUCTION["api_list"][0])
    assert tool["name"] == "get_2_find_book_for_city_library_v2" and tool["description"] == "Finds a book."
    assert tool["parameters"] == {"type": "object", "required": ["is_from", "max_count"], "properties": {
        "is_from": {"type": "string", "description": "first day"}, "max_count": {"type": "integer"}, "verbose": {"type": "boolean"}}}
    twice = {**INSTRUCTION, "query": "Where is Emma? ", "api_list": INSTRUCTION["api_list"] * 2}
    c, = data.read_toolbench(write(tmp_path, "q.json", [twice, {**twice, "query": 5}, {**twice, "query": " "}]))
    assert c["messages"] == [{"role": "user", "content": "Where is Emma?"}]
    assert [t.name for t in c["tools"]] == [tool["name"]]
    assert sum(data.encode(c, small.tokenizer())[1]) == 0  # no token of it is trained, so a run leaves it out
    with pytest.raises(UserError, match="nothing usable"):
        data.read_toolbench(tmp_path / "q.json", questions=False)


@pytest.mark.parametrize("name, standard", [("Get Player's-ID", "get_player_s_id"), ("2fa", "get_2fa"), ("id", "is_id"),
                                            ("__A  b__", "a_b"), ("Ünï", "n"), ("class", "is_class")])
def test_standard_names(name, standard):
    assert data.standard_name(name) == standard


def test_long_names_keep_their_end():
    api = {**INSTRUCTION["api_list"][0], "api_name": "a" * 80}
    assert data.toolbench_api(api)["name"].endswith("_for_city_library_v2")
    assert len(data.toolbench_api(api)["name"]) == 64


def test_names_types_and_thoughts_are_repaired(tmp_path):
    functions = [{"name": "find_book_for_library", "description": "",
                  "parameters": {"type": "object", "required": ["title"], "properties": {
        "title": {"type": "string"}, "count": {"type": "integer"}, "new": {"type": "boolean"}}}}]
    item = tree({"role": "assistant", "content": "First I think."},
                call("Find-Book for Library", '{"title": 1984, "count": "3", "new": "True", "zzz": 1}', "Then I look."), result("shelf 3"),
                call("find_book_for_library", '{"count": 3}'), result("?"),
                call("find_book_for_library", '{"title": "Emma", "count": "many"}'), result("?"), function=functions)
    path = write(tmp_path, "a[1].json", item)
    c, = data.read_toolbench(path, report=tmp_path / "report.json")
    assert c["messages"][1] == {"role": "assistant", "content": "First I think.\nThen I look.",
                                "tool_calls": [{"name": "find_book_for_library", "arguments": {"title": "1984", "count": 3, "new": True}}]}
    assert json.loads((tmp_path / "report.json").read_text())["calls_left_out"] == 2 and len(c["messages"]) == 4


def test_broken_and_made_up_calls_are_never_trained_on(tmp_path):
    bad = [call("find_book_for_library", "{title: Emma"), result("?"), call("no_such_function", "{}"), result("no such function"),
           call("find_book_for_library", '["Emma"]'), result("?")]
    path = write(tmp_path, "a.json", tree(*bad, call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    c, = data.read_toolbench(path, report=tmp_path / "report.json")
    assert [m["role"] for m in c["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads((tmp_path / "report.json").read_text())["calls_left_out"] == 3


@pytest.mark.parametrize("item, why", [
    (tree(end=finish(kind="give_up_and_restart")), "gives up"), (tree(end=call("Finish", "{broken")), "gives up"),
    (tree(end=finish("  ")), "gives up"),
    (tree(end={"role": "assistant", "content": "No Finish."}), "no Finish"), (tree(train_messages=[]), "train_messages"),
    ({"answer_generation": {"valid_data": False, "finish_type": "give_up", "function": FUNCTIONS, "query": "Find Emma."}},
     "no train_messages"), (tree(train_messages={"a": 1}), "damaged"), (tree(function=None), "damaged"),
    (dialogue(LLAMA_END, functions=[]) | {"conversations": [{"from": "system", "value": "no list"}]}, "functions cannot be read"),
    (tree(call("find_book_for_library", '{"title": "Emma"'), result("?")), "all its calls are broken"),
    (dialogue(("gpt", "Hi."), LLAMA_END), "unknown role"),
    (dialogue(LLAMA_END) | {"conversations": "x"}, "damaged"), (INSTRUCTION, "instruction"), ({"other": 1}, "none of ToolBench"),
    (7, "none of ToolBench")])
def test_what_cannot_be_used_is_counted(tmp_path, item, why):
    path = write(tmp_path, "a.json", [item, tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3"))])
    assert len(data.read_toolbench(path, report=tmp_path / "report.json", questions=False)) == 1
    items = json.loads((tmp_path / "report.json").read_text())["items"]
    assert items["used"] == 1 and sum(n for reason, n in items.items() if why in reason) == 1


def test_a_schema_without_end_costs_its_own_item_only(tmp_path):
    good = json.dumps(tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    deep = json.loads(good)
    deep["answer_generation"]["function"][0]["parameters"]["properties"] = {"title": "DEEP"}
    endless = '{"type": "array", "items": ' * 1200 + "{}" + "}" * 1200
    write(tmp_path, "a.jsonl", json.dumps(deep).replace('"DEEP"', endless) + "\n" + good)
    assert len(data.read_toolbench(tmp_path / "a.jsonl")) == 1


def test_damaged_files_are_named(tmp_path, capsys):
    good = json.dumps(tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "bom.json", "\ufeff" + good)
    write(tmp_path, "cut.json", good[:500])
    write(tmp_path, "empty.json", "")
    write(tmp_path, "other.json", '{"a": [1, 2]}')
    (tmp_path / "latin.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    assert len(data.read_toolbench(tmp_path)) == 1
    err = capsys.readouterr().err
    assert all(name in err for name in ("cut.json", "empty.json", "other.json", "latin.json")) and "noted  " in err
    assert "bom.json" in err and "1 conversations from 5 files" in err
    assert "4  files, lines or items damaged" in err
    assert len(data.read_toolbench(str(tmp_path / "deep" / "*.json"))) == 1
    with pytest.raises(UserError, match="no such file"):
        data.read_toolbench(tmp_path / "nowhere")


def test_results_are_clipped_until_it_fits(tmp_path):
    item = tree(call("find_book_for_library", '{"title": "Emma"}'), result("word " * 1000))
    path = write(tmp_path, "a.json", item)
    length = lambda c: sum(len(m["content"]) for m in c["messages"])  # noqa: E731
    assert 1000 < length(data.read_toolbench(path)[0]) < 1200
    assert length(data.read_toolbench(path, lambda c: length(c) < 400)[0]) < 400
    with pytest.raises(UserError, match="nothing usable"):
        data.read_toolbench(path, lambda c: False)


@pytest.mark.parametrize("method", ["sft", "dpo", "ppo"])
def test_it_is_a_source_for_every_method(tmp_path, method):
    item = tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3"))
    config = toolplay.load_config({"method": method, "model": "tiny", "source": "toolbench", "path": str(write(tmp_path, "a.json", item)),
                                   "max_tokens": 4000,
                                   "run_dir": str(tmp_path / "run"),
                                   **({"iterations": 1, "prompts": 1, "samples": 2, "max_new_tokens": 4} if method == "ppo"
                                      else {"steps": 1})})
    __import__(method).train(toolplay.Run(config))
    assert (tmp_path / "run" / "adapter").is_dir()


def test_the_command_line(tmp_path, capsys):
    write(tmp_path, "a.json", tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    data.main(["--toolbench", str(tmp_path / "a.json"), "--out", str(tmp_path / "out.jsonl"), "--report", str(tmp_path / "report.json")])
    assert "1 conversations written" in capsys.readouterr().out and (tmp_path / "report.json").exists()
    assert len(data.read_jsonl(tmp_path / "out.jsonl")) == 1
    with pytest.raises(SystemExit) as exit_:
        data.main(["--toolbench", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.jsonl")])
    assert exit_.value.code == 2


def test_exported_questions_can_be_asked(tmp_path):
    write(tmp_path, "a.json", [INSTRUCTION, {**INSTRUCTION, "query": "Find Persuasion"}])
    data.main(["--toolbench", str(tmp_path / "a.json"), "--questions", "--out", str(tmp_path / "q.jsonl")])
    toolplay.main(["predict", "--model", "tiny", "--max-new-tokens", "2", "--input", str(tmp_path / "q.jsonl"), "--output",
                   str(tmp_path / "o.jsonl")])
    assert [json.loads(line)["id"] for line in open(tmp_path / "o.jsonl")] == [1, 2]


GOOD = [call("find_book_for_library", '{"title": "Emma"}', "I look."), result("shelf 3")]
ASSISTANT = 'Thought: I look.\nAction: find_book_for_library\nAction Input: {"title": "Emma"}'


def one(folder, item, **options):
    """The only conversation of an item, and the report."""
    c, = data.read_toolbench(write(folder, "one.json", item), report=folder / "report.json", **options)
    return c, json.loads((folder / "report.json").read_text())


def test_a_list_of_functions_behind_brackets_is_found(tmp_path):
    good = dialogue(("assistant", ASSISTANT), ("function", "{}"), LLAMA_END)
    for before, after in ("1.lib: [DEPRECATED] A [library](x)\n", ""), ("", " Good luck [you]!"):
        item = json.loads(json.dumps(good))
        item["conversations"][0][
            "value"] = f"You have tools:\n{before}Specifically, you have access to the following APIs: {FUNCTIONS!r}{after}"
        assert len(one(tmp_path, item)[0]["tools"]) == 1
    item["conversations"][0]["value"] = f"[Tools] {json.dumps(FUNCTIONS)}"
    assert len(one(tmp_path, item)[0]["tools"]) == 1


@pytest.mark.parametrize("said, content", [
    ('{"error": "", "response": "[{\\"id\\": 7, \\"a\\u00e9...', '{"result": "[{\\"id\\": 7, \\"aé"}'),
    ('{"error": "", "response": "caf\\u00E9 is...', '{"result": "café is"}'),
    ('{"error": "busy", "response": "abc...', '{"error": "busy abc"}'),
    ('{"error": "", "response": "cut in \\u00...', '{"result": "cut in "}'),
    ('{"error": "API not working"}', '{"error": "API not working"}'),
    ('{"error": "", "response": {"a": [1, null]}}', '{"result": "{\\"a\\": [1, null]}"}'), ("plain", '{"result": "plain"}'),
    ('{"error": "gone"', '{"result": "{\\"error\\": \\"gone\\""}'),
    ('{"error": "", "response": "it\\\'s cut...', '{"result": "{\\"error\\": \\"\\", \\"response\\": \\"it\\\\\'s cut"}'),
    ('{"error": {"code": 429}, "response": ""}', '{"error": "{\\"code\\": 429}"}'),
    # not wrapped by ToolBench, or broken in another way: nothing of it may be lost
    ('{"status": "OK", "data": [1], "response": 200}', '{"result": "{\\"status\\": \\"OK\\", \\"data\\": [1], \\"response\\": 200}"}'),
    ('{"error": "", "response": "He said "hi" to 3"}', r'{"result": "{\"error\": \"\", \"response\": \"He said \"hi\" to 3\"}"}')])
def test_results_are_unwrapped_also_where_toolbench_cut_them(tmp_path, said, content):
    c, _ = one(tmp_path, tree(GOOD[0], {"role": "function", "name": "x", "content": said}))
    assert c["messages"][2]["content"] == content


def test_objects_empty_arguments_and_a_damaged_last_step(tmp_path):
    c, _ = one(tmp_path, tree(GOOD[0], {"role": "function", "name": "x", "content": {"error": "", "response": {"a": 1}}}))
    assert c["messages"][2]["content"] == '{"result": "{\\"a\\": 1}"}'
    c, _ = one(tmp_path, tree(call("find_book_for_library", '{"title": "Emma", "is_id": ""}'), GOOD[1]))
    assert c["messages"][1]["tool_calls"][0]["arguments"] == {"title": "Emma"}
    free = [{**FUNCTIONS[0], "parameters": {"type": "object", "properties": {}, "required": [], "optional": []}}, FUNCTIONS[1]]
    c, _ = one(tmp_path, dialogue(("assistant", "Thought: t\nAction: find_book_for_library\nAction Input:"), ("function", "{}"), LLAMA_END,
                                  functions=free))
    assert c["messages"][1]["tool_calls"][0]["arguments"] == {}
    item = tree(*GOOD)
    item["answer_generation"]["train_messages"].append([])
    assert len(one(tmp_path, item)[0]["messages"]) == 4


def test_toolbench_s_own_cut_is_not_ours(tmp_path):
    assert one(tmp_path, tree(GOOD[0], {"role": "function", "content": "a" * 1024 + "..."}))[1]["items"] == {"used": 1}
    assert one(tmp_path, tree(GOOD[0], {"role": "function", "content": "a" * 1025}))[1]["items"] == {"used, its results clipped": 1}


def test_a_broken_finish_may_be_mended(tmp_path):
    c, report = one(tmp_path, tree(*GOOD, call("Finish", '{"final_answer": "It is there."}'), {"role": "function", "content": "{error}"}))
    assert [m["role"] for m in c["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert report["calls_left_out"] == 1


@pytest.mark.parametrize("text, thought, call_", [
    ("\nThought: Hm.\n\nAction: Call the 'find' function.\nAction: find\nAction Input: {}", "\nThought: Hm.\n\nAction: Call the 'find' "
                                                                                            "function.\n", ("find", " {}")),
    ("My plan. Action: look it up.", "My plan. Action: look it up.", None), ("Thought: a\nAction: find", "Thought: a\n", ("find", None)),
    ("Action: f\nAction Input:", "", ("f", None)),
    ("Only words", "Only words", None), ("", "", None)])
def test_an_action_is_the_last_that_is_named(text, thought, call_):
    assert data.toolbench_action(text) == (thought, call_)


def test_thoughts_lose_their_mark_and_go_with_their_call(tmp_path):
    two = "\nThought: First.\nThought: Second.\nAction: find_book_for_library\nAction Input: {\"title\": \"Emma\"}"
    assert one(tmp_path, dialogue(("assistant", two), ("function", "{}"), LLAMA_END))[0]["messages"][1]["content"] == "First.\nSecond."
    c, report = one(tmp_path, tree({"role": "assistant", "content": "My plan. Action: look."}, *GOOD))
    assert c["messages"][1]["content"] == "My plan. Action: look.\nI look." and report["calls_left_out"] == 0
    c, report = one(tmp_path, tree({"role": "assistant", "content": "I call no_such."}, call("no_such", "{}"), result("?"), *GOOD))
    assert c["messages"][1]["content"] == "I look." and report["calls_left_out"] == 1
    c, _ = one(tmp_path, tree(call("find_book_for_library", '{"title": "Emma"}', "Say <tool_call>{oops}</tool_call>"), result("?"),
                              end=finish("<tool_call>no")))
    assert c["messages"][1]["content"] == "Say [tool_call]{oops}[tool_call]"
    assert c["messages"][-1]["content"] == "[tool_call]no"


def test_of_two_functions_of_a_name_the_first_is_meant(tmp_path):
    other = {**FUNCTIONS[0], "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
    c, _ = one(tmp_path, tree(*GOOD, function=[FUNCTIONS[0], other, FUNCTIONS[1]]))
    assert [t.signature()[:36] for t in c["tools"]] == ["find_book_for_library(title: string,"]


def test_names_and_types_of_answers_are_standardised(tmp_path):
    odd = [{"name": "Find Book for Library", "description": "x",
            "parameters": {"type": "object", "required": ["title", "count"], "properties": {
        "title": {"type": "STRING"}, "count": {"type": "NUMBER"}, "kind": {"type": "ENUM"}, "tags": {"type": "array"}}}}]
    c, _ = one(tmp_path, tree(call("Find Book for Library", '{"title": "Emma", "count": "3"}'), result("?"), function=odd))
    assert c["tools"][0].signature().startswith("find_book_for_library(title: string, count: integer, kind?: string, tags?: array)")
    assert c["messages"][1]["tool_calls"] == [{"name": "find_book_for_library", "arguments": {"title": "Emma", "count": 3}}]
    api = {**INSTRUCTION["api_list"][0], "tool_name": "ID", "optional_parameters": [{"name": "max-count", "type": "STRING"}]}
    made = data.toolbench_api(api)
    assert made["name"] == "get_2_find_book_for_id"
    assert made["parameters"]["properties"]["max_count"] == {"type": "integer"}
    assert data.standard_name("天气 API") == "天气_api"


@pytest.mark.parametrize("text, arguments", [
    ('```json\n{"title": "Emma"}\n```', {"title": "Emma"}), ("{'title': 'Emma', 'is_id': None}", {"title": "Emma"}),
    ('"{\\"title\\": \\"Emma\\"}"', {"title": "Emma"}),
    ('{"title": "Emma"}\nObservation: none', {"title": "Emma"}), ('{"title": "Em\\_ma"}', {"title": "Em_ma"}),
    ('{"title": true, "is_id": "5.0"}', {"title": "true", "is_id": 5}),
    ('{"title": ["a", 1]}', {"title": '["a", 1]'}), ({"title": "E\ud800"}, {"title": "E\ufffd"}),
    ('{"title": "Emma", "zzz": 1,}', {"title": "Emma"})])
def test_arguments_that_can_be_mended(tmp_path, text, arguments):
    c, report = one(tmp_path, tree(call("find_book_for_library", text), result("?")))
    assert c["messages"][1]["tool_calls"][0]["arguments"] == arguments and report["calls_left_out"] == 0


def test_functions_without_a_letter_of_the_alphabet_cost_nothing_but_themselves(tmp_path):
    foreign = [{"name": name, "description": "x", "parameters": {"type": "object", "properties": {"한국": {"type": "string"}},
                                                                 "required": ["한국", "한국"]}} for name in ("한국", "日本 ✓", "!?", "g")]
    c, _ = one(tmp_path, tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3"), call("한국", "{}"), result("?"),
                              function=[*foreign, *FUNCTIONS]))
    assert [t.name for t in c["tools"]][-2:] == ["g", "find_book_for_library"]
    assert sum("tool_calls" in m for m in c["messages"]) == 1
    assert c["tools"][-2].parameters["required"] == ["한국"]


def test_choices_of_numbers_may_be_texts(tmp_path):
    function = {"name": "pick", "description": "x",
                "parameters": {"type": "object", "properties": {"size": {"type": "NUMBER", "enum": ["1", "2"], "default": "1"}},
                               "required": ["size"]}}
    for argument in ("2", '"2"'):
        c, _ = one(tmp_path, tree(call("pick", f'{{"size": {argument}}}'), result("x", "pick"), function=[function, *FUNCTIONS]))
        assert c["messages"][1]["tool_calls"] == [{"name": "pick", "arguments": {"size": 2}}]
        assert c["tools"][0].parameters["properties"]["size"] == {"type": "integer", "enum": [1, 2], "default": 1}


def test_a_number_may_be_a_fraction(tmp_path):
    c, report = one(tmp_path, tree(call("find_book_for_library", '{"title": "Emma", "is_id": "5.25"}'), result("?")))
    assert c["messages"][1]["tool_calls"][0]["arguments"] == {"title": "Emma", "is_id": 5.25}
    assert report["calls_left_out"] == 0
    # the tool's schema accepts the argument that is learned
    assert next(t for t in c["tools"] if t.name == "find_book_for_library").parameters["properties"]["is_id"]["type"] == "number"


@pytest.mark.parametrize("text", ['{"title": NaN}', {"title": float("nan")}, [], '{"zzz": 1}', '{"title": "Emma"', "{'title': {1, 2}}",
                                  '{"title": "a", "title": "b"}', "__import__('os')", '{"title": null}'])
def test_arguments_that_can_not(tmp_path, text):
    c, report = one(tmp_path, tree(call("find_book_for_library", text), result("?"), *GOOD))
    assert len(c["messages"]) == 4 and report["calls_left_out"] == 1


def test_wrong_shapes_are_named_whatever_they_are(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for n, item in enumerate([{"answer_generation": None}, {"conversations": 5},
                              tree(*GOOD, function=[{**FUNCTIONS[0], "name": float("nan")}]),
                              tree(*GOOD, function=[{**FUNCTIONS[0], "description": 5}]),
                              {"query": "x", "api_list": [{"tool_name": None, "api_name": "a"}]}]):
        write(folder, f"{n}.json", item)
    write(folder, "lines.json", "\n".join(map(json.dumps, [tree(*GOOD), [tree(*GOOD, end=finish("Yes."))], None])))
    write(folder, "UPPER.JSON", tree(*GOOD, end=finish("No.")))
    (folder / "link.json").symlink_to(folder / "link.json")
    (folder / "loop").symlink_to(folder)
    assert len(data.read_toolbench(folder, report=tmp_path / "report.txt")) == 3
    report = json.loads((tmp_path / "report.txt").read_text())
    assert {Path(name).name for name in report["damaged_files"]} == {*(f"{n}.json" for n in range(5)), "lines.json, item 3", "link.json"}
    assert report["files"] == 8
    assert len(data.read_toolbench(str(folder / "**"))) == 3 and len(data.read_toolbench(str(tmp_path / "*"))) == 3


def test_a_template_that_refuses_turns_costs_that_conversation_only(tmp_path):
    def fits(conversation):
        if [m["role"] for m in conversation["messages"]].count("user") > 1:
            raise UserError("the tokenizer's chat template refuses the turns")
        return True
    path = write(tmp_path, "a.json", [tree(*GOOD), tree(*GOOD, {"role": "user", "content": "Go on."})])
    assert len(data.read_toolbench(path, fits, report=tmp_path / "report.json")) == 1
    assert json.loads((tmp_path / "report.json").read_text())["items"] == {"used": 1, "the tokenizer's chat template refuses the turns": 1}


def test_halves_of_surrogates_and_names_that_are_no_text(tmp_path, capsys):
    function = {**FUNCTIONS[0], "description": "A book. Half: \ud83d"}
    path = tmp_path / "bad\udcff.json"
    path.write_text(json.dumps(tree(*GOOD, function=[function])))
    data.main(["--toolbench", str(tmp_path), "--out", str(tmp_path / "out.jsonl"), "--report", str(tmp_path / "report.txt")])
    assert len(data.read_jsonl(tmp_path / "out.jsonl")) == 1
    assert json.loads((tmp_path / "report.txt").read_text())["conversations"] == 1


def test_names_of_another_kind_lead_to_files_too(tmp_path):
    """As in the hub's cache: blobs without a readable name, and links with one."""
    for blobs in ("a_blobs", "z_blobs"):  # walked before the links, or after them
        folder = tmp_path / blobs
        (folder / "m").mkdir(parents=True)
        (folder / blobs).mkdir()
        write(folder / blobs, "3fa9", tree(*GOOD))
        for link in "ab":
            (folder / "m" / f"{link}.json").symlink_to(folder / blobs / "3fa9")
        assert len(data.read_toolbench(folder)) == 1


def test_a_pipe_is_named_and_not_waited_for(tmp_path, capsys):
    write(tmp_path, "a.json", [tree(*GOOD)])
    os.mkfifo(tmp_path / "b.json")
    assert len(data.read_toolbench(tmp_path)) == 1 and "no file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", [" " * 200_000 + "b", "a" + "\n" * 200_000 + "b", "Action: " * 100_000, "Action: a Action Input " * 50_000,
                                  "Thought: " * 100_000, "[" * 200_000])
def test_long_texts_are_read_in_linear_time(tmp_path, text):
    """In quadratic time these would take minutes."""
    start = time.monotonic()
    data.read_toolbench(write(tmp_path, "a.json", [tree(call("find_book_for_library", '{"title": "Emma"}', text), result(text)),
                                                   dialogue(("assistant", text), ("assistant", ASSISTANT), ("function", text), LLAMA_END),
                                                   {"conversations": [{"from": "system", "value": text}]}]))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("arguments", [["--report", "x"], ["--max-tokens", "5", "--show", "1"], ["--toolbench", "x", "--max-tokens", "0"],
                                       ["--show", "-1"],
                                       ["--toolbench", "x", "--kind", "weather"]])
def test_options_that_go_nowhere_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        data.main(arguments)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith(("error: --", "error: argument --")) and said.count("\n") == 1


# ---------------------------------------------------------------- without ToolBench

SETTINGS = {"method": "sft", "model": "tiny", "source": "toolbench", "steps": 1, "examples": 6, "eval_examples": 3, "max_tokens": 4000}


def test_without_a_path_invented_functions_stand_in_and_it_is_said(tmp_path, capsys):
    config = toolplay.load_config({**SETTINGS, "run_dir": str(tmp_path / "run")})
    assert "no path" in capsys.readouterr().err
    made = data.conversations(config, "train", None)
    assert len(made) == 6 and all(c["kind"].startswith("api_") for c in made)
    assert len(data.conversations(config, "dev", None)) == 3
    toolplay.main(["train", str(write(tmp_path, "c.json", SETTINGS)), f"--run_dir={tmp_path / 'run'}"])
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["source"], kept["fallback"]) == ("synthetic", "synthetic")
    toolplay.main(["eval", "--run", str(tmp_path / "run"), "--n", "2"])
    assert data.stand_in(toolplay.load_config({"mix": {"sums": 3, "api_one": 2}}), "so") == {"api_one": 2}
    assert data.stand_in(toolplay.load_config({"mix": {"sums": 3}}), "so") == data.SYNTHETIC
    assert "used instead of ToolBench" in capsys.readouterr().out
    assert "ToolBench" in json.loads((tmp_path / "run" / "eval.json").read_text())["trained_on"]


def test_a_fallback_takes_the_place_of_a_useless_path(tmp_path, capsys):
    """The config must ask for the fallback; otherwise a path that holds nothing usable is an error."""
    path = str(write(tmp_path, "a.json", [{"neither": "nor"}]))
    with pytest.raises(UserError, match="nothing usable"):
        data.conversations(toolplay.load_config({**SETTINGS, "path": path}), "train", toolplay.load_model("tiny")[1])
    run = str(tmp_path / "run")
    config = write(tmp_path, "c.json", {**SETTINGS, "path": path, "fallback": "synthetic", "run_dir": run})
    toolplay.main(["train", str(config)])
    assert "nothing usable" in capsys.readouterr().err
    assert json.loads(Path(run, "config.json").read_text())["source"] == "synthetic"
    written = Path(run, "config.json").read_bytes()
    toolplay.main(["train", str(config), "--resume"])  # the same run, although its source is now another one
    assert Path(run, "config.json").read_bytes() == written  # it keeps the provenance of its beginning


def test_a_good_path_needs_no_fallback(tmp_path, capsys):
    item = tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3"))
    config = toolplay.load_config({**SETTINGS, "path": str(write(tmp_path, "a.json", item)), "fallback": "synthetic"})
    made = data.conversations(config, "train", toolplay.load_model("tiny")[1])
    assert len(made) == 1 and config.source == "toolbench" and "stand in" not in capsys.readouterr().err


def test_what_stood_in_when_a_run_began_stays(tmp_path, capsys):
    """A fallback for the held-out data alone does not change training; files repaired later do not change a run that has begun."""
    good, bad = write(tmp_path, "good.json", tree(call("find_book_for_library", '{"title": "Emma"}'),
                                                  result("shelf 3"))), write(tmp_path, "bad.json", [{}])
    config = toolplay.load_config({**SETTINGS, "path": str(good), "eval_path": str(bad), "fallback": "synthetic"})
    tokenizer = toolplay.load_model("tiny")[1]
    assert len(data.conversations(config, "train", tokenizer)) == 1
    assert len(data.conversations(config, "dev", tokenizer)) == 3 and config.source == "toolbench"
    assert "not read" not in capsys.readouterr().err
    data.stand_in(toolplay.load_config({"source": "jsonl", "path": str(good), "eval_path": str(good)}), "why")
    assert f"eval_path = {good} is not read" in capsys.readouterr().err
    settings = {**SETTINGS, "path": str(bad), "fallback": "synthetic", "run_dir": str(tmp_path / "run")}
    toolplay.main(["train", str(write(tmp_path, "c.json", settings))])
    write(tmp_path, "bad.json", tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    resumed = toolplay.load_config(settings)
    toolplay.Run(resumed, resume=True)
    assert resumed.source == "synthetic"


def test_nobody_asks_and_lines_that_are_no_json(tmp_path):
    item = tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3"))
    silent = json.loads(json.dumps(item))
    for step in silent["answer_generation"]["train_messages"]:
        step[:] = [m for m in step if m["role"] != "user"]
    (tmp_path / "a.jsonl").write_text(json.dumps(silent) + "\n{broken\n" + json.dumps(item) + "\n")
    made = data.read_toolbench(tmp_path / "a.jsonl", report=tmp_path / "report.json")
    assert len(made) == 1 and made[0]["messages"][0]["role"] == "user"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["items"] == {"nobody asks for anything": 1, "used": 1}
    assert report["damaged_files"] == {f"{tmp_path / 'a.jsonl'}, line 2": "it is no JSON"}


def test_results_and_calls_without_a_partner_are_never_learned():
    """A call or result without a partner is left out and counted; no answer follows a call directly."""
    tools = [{"name": "find", "description": "", "parameters": {"type": "object", "properties": {"q": {"type": "string"}},
                                                                "required": ["q"]}}]
    call = {"role": "assistant", "function_call": {"name": "find", "arguments": '{"q": "a"}'}}
    result = {"role": "function", "name": "find", "content": '{"error": "", "response": []}'}
    end = {"role": "assistant", "function_call": {"name": "Finish", "arguments": '{"return_type": "give_answer ", "final_answer": 0}'}}

    def read(*steps):
        item = {"answer_generation": {"function": tools, "train_messages": [[{"role": "user", "content": "Find a."}, *steps]]}}
        conversation, dropped, _ = data.toolbench_conversation("answer tree", item)
        return [m["role"] for m in conversation["messages"]], dropped
    assert read(call, result, end) == (["user", "assistant", "tool", "assistant"], 0)
    assert read(call, result, result, end) == (["user", "assistant", "tool", "assistant"], 1)
    assert read(call, result, call, end) == (["user", "assistant", "tool", "assistant"], 1)
    for steps in ([call, end], [{"role": "assistant", "content": "", "tool_calls": [{}]}, result, end]):
        with pytest.raises(data.Unusable, match="all its calls"):
            read(*steps)


def test_the_inner_list_of_a_function_is_not_the_list_of_functions():
    text = "access to the following APIs: [{'name': 'find', 'parameters': {'type': 'object', 'properties': {}, 'required': [], 'optional': []}}]"
    assert data.toolbench_functions(text)[0]["name"] == "find"
    # the last one ended Python 3.10: its parser is not made for such depths
    for damaged in (text[:-3], text.replace("'object'", "nan"), text.replace("'object'", "1+" * 200_000 + "1")):
        with pytest.raises(data.Damaged, match="list of functions"):
            data.toolbench_functions(damaged)


@pytest.mark.parametrize("text, call",
                         [('Thought: As Action Input: I give it.\nAction: find\nAction Input: {"q": "a"}', ("find", ' {"q": "a"}')),
                          ("Thought: x\naction: find\naction input: {}", ("find", " {}")),
                                        ("Thought: x\nAction：find\nAction Input：{}", ("find", "{}")),
                          ("Thought: x Action: find Action Input: {}", ("find", " {}"))])
def test_actions_however_they_are_marked(text, call):
    assert data.toolbench_action(text)[1] == call


def test_odd_schemas_and_names():
    made = data.toolbench_function({"name": "f", "description": 'Find the "book"',
                                    "parameters": {"properties": {"Max Count": {"type": "NUMBER", "enum": None}, "kind": {"enum": []}},
                                                   "required": ["Max Count"]}})
    assert made["description"] == 'Find the "book"'
    assert made["parameters"] == {"type": "object", "properties": {"max_count": {"type": "integer"}, "kind": {}}, "required": ["max_count"]}
    assert data.toolbench_repaired({"Max Count": "5"}, made) == {"max_count": 5}
    assert [json.loads(data.toolbench_observation(json.dumps({"error": "", "response": x}), 99)[0])["result"]
            for x in ([], 0, False, None, "")] == ["[]", "0", "false", "", ""]


def test_one_bad_line_in_a_json_file_of_lines(tmp_path):
    good = json.dumps({"api_list": [], "query": "Find a."})
    items, bad = data.toolbench_items("{oops\n" + good + "\n" + good)
    assert len(items) == 2 and list(bad) == [1]
    with pytest.raises(ValueError):
        data.toolbench_items('[1,\n2,\n{"a":')


def test_words_to_a_user_who_answers_stay_where_they_are(tmp_path):
    item = tree(call("find_book_for_library", '{"title": "Emma"}', "I look."), result("shelf 3"))
    messages = item["answer_generation"]["train_messages"][-1]
    at = next(n for n, m in enumerate(messages) if m["role"] == "user") + 1
    messages[at:at] = [{"role": "assistant", "content": "Which library?"}, {"role": "user", "content": "City."}]
    made, _ = one(tmp_path, item)
    assert [(m["role"], m["content"]) for m in made["messages"]][1:4] == [("assistant", "Which library?"), ("user", "City."),
                                                                          ("assistant", "I look.")]


def test_long_and_odd_names_find_their_calls(tmp_path):
    for name, standard in (("find_the_very_long_named_function_that_goes_on_and_on_for_books_in_the_library", None),
                           ("FindBook", "findbook"), ("2fa", "get_2fa"), ("from", "is_from")):
        item = json.loads(json.dumps(tree(call("find_book_for_library", '{"title": "Emma"}'),
                                          result("shelf 3"))).replace("find_book_for_library", name))
        made, _ = one(tmp_path, item)
        called = made["messages"][1]["tool_calls"][0]["name"]
        assert called == (standard or name[-64:]) == made["tools"][0].name


@pytest.mark.parametrize("text, value", [(r'{"path": "C:\\_dir", "deep": true}', {"path": "C:\\_dir", "deep": True}),
                                         (r'{"a": "it\'s", "b": true}', {"a": "it's", "b": True}),
                                         (r'{"a\_b": 1}', {"a_b": 1}), (r"{'a': 'it\'s', 'b': True}", {"a": "it's", "b": True})])
def test_escapes_that_json_does_not_know(text, value):
    assert data.toolbench_arguments(text) == value


def test_other_files_of_a_folder_are_named(tmp_path, capsys):
    write(tmp_path, "a.json", tree(call("find_book_for_library", '{"title": "Emma"}'), result("shelf 3")))
    write(tmp_path, "b.txt", tree())
    data.read_toolbench(tmp_path)
    assert "b.txt: not read: its name has no .json" in capsys.readouterr().err


def test_a_call_that_is_a_huge_literal_is_none():
    assert data.toolbench_arguments("{'a': " + "1+" * 200_000 + "1}") is None


FIND = "find_book_for_library"
PICK = {"name": "pick", "description": "", "parameters": {"type": "object", "properties": {
    "numbers": {"type": "array", "items": {"type": "NUMBER"}}, "maybe": {"type": ["NUMBER", "null"]}, "odd": "string", "bad": {
        "type": "number", "default": float("nan")}}, "required": []}}


def test_a_result_belongs_to_the_call_of_its_name(tmp_path):
    """A damaged file may have lost messages: better no result than that of another call."""
    good = [call(FIND, '{"title": "Emma"}'), result("shelf 3")]
    for steps, lost in (([call(FIND, '{"title": "A"}'), call("pick", "{}"), result("a"), result("b", "pick")], 3),
                        ([call("pick", "{}"), result("a")], 1), ([call(FIND, '{"title": "A"}'), result("a", "pick")], 1)):
        made, report = one(tmp_path, tree(*steps, *good, function=[PICK, *FUNCTIONS]))
        assert [m.get("tool_calls") or m["content"] for m in made["messages"][1:]] == [
            [{"name": FIND, "arguments": {"title": "Emma"}}], '{"result": "shelf 3"}', "It is there."]
        assert report["calls_left_out"] == lost
    # two calls of one function, or results without names: nobody knows which call the first result answers
    again = [call(FIND, '{"title": "A"}'), call(FIND, '{"title": "B"}'), result("a"), result("b")]
    said = lambda title: ("assistant", f'Thought: x\nAction: {FIND}\nAction Input: {{"title": "{title}"}}')  # noqa: E731
    for item in (tree(*again, *good), dialogue(said("A"), said("B"), ("function", "a"), ("function", "b"),
                                               said("Emma"), ("function", "shelf 3"), LLAMA_END)):
        made, report = one(tmp_path, item)
        assert [m["tool_calls"][0]["arguments"] for m in made["messages"] if m.get("tool_calls")] == [{"title": "Emma"}]
        assert report["calls_left_out"] == 3
    # a call without a result before one whose result has its name
    made, _ = one(tmp_path, tree(call("pick", "{}"), *good, function=[PICK, *FUNCTIONS]))
    assert made["messages"][1]["tool_calls"][0]["name"] == FIND and len(made["messages"]) == 4


@pytest.mark.parametrize("text", ['Thought: I look.\nAction Input: {"title": "A", }}', 'Action: find\nAction Input: {"title": broken',
                                  "I look.\naction input: {}"])
def test_a_call_that_cannot_be_read_is_not_learned_as_words(tmp_path, text):
    for item in (dialogue(("assistant", text), ("function", "?"),
                          ("assistant", f'Thought: again\nAction: {FIND}\nAction Input: {{"title": "Emma"}}'), ("function", "shelf 3"), LLAMA_END),
                 tree({"role": "assistant", "content": text}, call(FIND, '{"title": "Emma"}', text), result("shelf 3"))):
        made, report = one(tmp_path, item)
        assert not any("input" in m["content"].lower() or "broken" in m["content"] for m in made["messages"])
        assert made["messages"][1]["tool_calls"] == [{"name": FIND, "arguments": {"title": "Emma"}}]


def test_further_calls_of_one_turn_are_counted(tmp_path):
    more = '\nObservation: none\nThought: Once more.\nAction: pick\nAction Input: {"numbers": [1]}'
    made, report = one(tmp_path, dialogue(("assistant", ASSISTANT + more), ("function", "shelf 3"), LLAMA_END))
    assert [m.get("tool_calls") for m in made["messages"]] == [None, [{"name": FIND, "arguments": {"title": "Emma"}}], None, None]
    assert report["calls_left_out"] == 1


def test_damage_in_a_line_costs_this_line(tmp_path):
    lines = [json.dumps(tree(*GOOD)).replace("Find Emma", f"Find book {n}").encode() for n in range(4)]
    lines[2] = lines[2].replace(b"book 2", b"book \xff")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.json").write_bytes(b"[\n" + b",\n".join(lines[:2]).replace(b"Find book", b"Find novel") + b",\n")  # cut off
    (tmp_path / "c.json").write_bytes(lines[2])
    made = data.read_toolbench(tmp_path, report=tmp_path / "report")
    report = json.loads((tmp_path / "report").read_text())
    assert len(made) == 5
    assert {Path(name).name: why for name, why in report["damaged_files"].items()} == {
        "a.jsonl, line 3": "a byte of it is not UTF-8", "b.json, line 1": "it is no JSON", "c.json": "a byte of it is not UTF-8"}


@pytest.mark.parametrize("text, arguments", [
    ("  ", {}), ('{"title": "Peru"} as asked', {"title": "Peru"}), ('{"title": "Peru"}, "shelf": 3}', None),
    ('{"пока": "Peru"}', None)])
def test_arguments_of_a_call_are_read_or_left_out(text, arguments):
    tool = data.toolbench_function({"name": "f", "parameters": {"properties": {
        name: {"type": "string"} for name in ("title", "shelf", "город")}}})
    made = data.toolbench_call("f", text, {"f": tool})
    assert (made and made["arguments"]) == arguments


def test_python_s_names_of_types_are_standardised_with_their_values():
    kinds = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "list": "array", "dict": "object"}
    tool = data.toolbench_function({"name": "f", "parameters": {"properties": {kind: {"type": kind} for kind in kinds}}})
    assert {name: field["type"] for name, field in tool["parameters"]["properties"].items()} == kinds
    made = data.toolbench_call("f", '{"int": "5", "float": "5.5", "str": 5, "bool": "True", "list": "[1]", "dict": "{}"}', {"f": tool})
    assert made["arguments"] == {"int": 5, "float": 5.5, "str": "5", "bool": True, "list": [1], "dict": {}}


def test_a_long_name_finds_its_call_wherever_it_is_cut(tmp_path):
    name = "a" * 5 + "_" + "b" * 63
    function = {"name": name, "parameters": {"properties": {"title": {"type": "string"}}}}
    made, report = one(tmp_path, tree(call(name, '{"title": "A"}'), result("a", name), function=[function, *FUNCTIONS]))
    assert len(made["messages"]) == 4 and not report["calls_left_out"]


def test_what_is_odd_is_repaired_or_named(tmp_path):
    numbers = lambda given: [call("pick", given), result("x", "pick")]  # noqa: E731
    for given, read in (('{"numbers": ["1", "2"]}', [1, 2]), ('{"numbers": [1.5, 2]}', [1.5, 2])):
        made, _ = one(tmp_path, tree(*numbers(given), end=call("finish ", '{"return_type": "give_answer", "final_answer": "Done \\ud83d."}'),
                                     query="q", function=[PICK, *FUNCTIONS]))
        assert made["messages"][1]["tool_calls"][0]["arguments"] == {"numbers": read} and made["messages"][-1]["content"] == "Done \ufffd."
        fields = made["tools"][0].parameters["properties"]
        assert fields["maybe"] == {"type": ["integer", "null"]} and fields["odd"] == {"type": "string"} and fields["bad"] == {"type": "number"}
        assert fields["numbers"]["items"]["type"] == ("number" if 1.5 in read else "integer")
    good = [call(FIND, '{"title": "Emma"}', "hm \ud83d"), result("shelf 3")]
    made, _ = one(tmp_path, tree({"role": "user", "content": "Begin!"}, *good))
    assert [m["content"] for m in made["messages"][:2]] == ["Find Emma for me.", "hm \ufffd"]
    for broken in ([], 0, False, {"title": "x" * 120_000}, "{'title': 'a', 'title': 'b'}"):
        made, report = one(tmp_path, tree(call(FIND, broken), result("?"), *good))
        assert len(made["messages"]) == 4 and report["calls_left_out"] == 1
    write(tmp_path, "gpt.json", dialogue(("gpt", "hello"), LLAMA_END))
    data.read_toolbench(tmp_path, report=tmp_path / "report.txt")
    assert "unknown role" in json.loads((tmp_path / "report.txt").read_text())["damaged_files"][str(tmp_path / "gpt.json")]
    inner = "access to the following APIs: [{'name': 'a', 'parameters': {'x': nan, 'oneOf': [{'name': 'q'}]}}]"
    with pytest.raises(data.Damaged):
        data.toolbench_functions(inner)
