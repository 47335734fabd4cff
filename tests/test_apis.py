"""The synthetic functions: enough of every type, none in two splits, and requests say what the calls need."""
import json
import random
import re
from collections import Counter

import pytest

import data
from tools import BUILTIN, _problems, load_tools

KINDS = [kind for kind in data.KINDS if kind.startswith("api_")]


@pytest.fixture(scope="module")
def made():
    return {(split, kind): data.generate(split, n, 0, {kind: 1}) for split, n in (("train", 150), ("dev", 30), ("test", 60))
            for kind in KINDS}


def parameters(function):
    for p in function["parameters"]:
        yield p
        yield from p.get("properties", [])


def test_there_are_enough_of_them():
    domains = data.corpus("apis.json")["domains"]
    functions = [(d["name"], tuple(f["words"])) for d in domains for f in d["functions"]]
    assert len(domains) >= 25 and len(set(functions)) == len(functions) >= 300
    types = Counter("enum" if "enum" in p else p["type"] for d in domains for f in d["functions"] for p in parameters(f))
    assert set(types) == {"string", "integer", "number", "boolean", "enum", "array", "object"}
    assert min(types.values()) >= 10
    assert all(1 <= len(f["parameters"]) <= 6 and any(p["required"] for p in f["parameters"]) for d in domains for f in d["functions"])
    assert any(not p["required"] and "default" in p for d in domains for f in d["functions"] for p in f["parameters"])


def test_every_function_can_be_asked_for():
    rng = random.Random(0)
    for domain in data.corpus("apis.json")["domains"]:
        for function in domain["functions"]:
            writer = data.ApiWriter(domain["split"], rng, False)
            shown = writer.variant(function, 0)
            tool = writer.tool(domain, shown)
            for spread in (1, 3):
                text, several = writer.request(shown, spread=spread)
                assert "{" not in text and 1 <= len(several) <= spread
                for arguments in several:
                    assert not list(_problems(arguments, {**tool["parameters"], "type": "object"})), (domain["name"], function["words"],
                                                                                                      arguments)
                    assert set(tool["parameters"]["required"]) <= set(arguments)


def test_domains_belong_to_one_split(made):
    families = {split: {c["family"] for (s, _), cs in made.items() if s == split for c in cs if "." in c["family"]}
                for split in ("train", "dev", "test")}
    domains = {split: {family.partition(".")[0] for family in families[split]} for split in families}
    assert not domains["train"] & domains["test"] and not domains["train"] & domains["dev"]
    assert not domains["dev"] & domains["test"]
    words = {split: {tuple(f["words"]) for d in data.corpus("apis.json")["domains"] if d["split"] == split for f in d["functions"]}
             for split in families}
    assert not words["train"] & words["test"] and not words["train"] & words["dev"] and not words["dev"] & words["test"]


def test_calls_fit_the_tools_that_are_offered(made):
    for (split, kind), conversations in made.items():
        for c in conversations:
            tools = load_tools(c["tools"])
            calls = c["messages"][1].get("tool_calls", [])
            assert bool(calls) is (kind not in ("api_ask", "api_none"))
            assert len(calls) == {"api_parallel": len(calls)}.get(kind, len(calls[:1]))
            assert (kind != "api_parallel" or len(calls) >= 2)
            for call in calls:
                assert not list(_problems(call["arguments"], {"type": "object", **tools[call["name"]].parameters})), c
            assert len(tools) >= {"api_choice": 2}.get(kind, 1)
            data.check_conversation(c)


def test_the_request_says_what_the_call_needs(made):
    """Codes, names and titles appear word for word in the message, except values that a whole sentence puts in its own words."""
    told = {(name, str(value)) for name, items in data.corpus("api_sentences.json")["sentences"].items()
            for item in items if isinstance(item, list) for value in item[1].values()}
    found = 0
    for c in made["train", "api_one"] + made["test", "api_choice"]:
        text = c["messages"][0]["content"].lower()
        for call in c["messages"][1]["tool_calls"]:
            for value in call["arguments"].values():
                if isinstance(value, str) and (c["family"].partition(".")[2], value) not in told and any(ch.isupper() for ch in value):
                    assert value.lower() in text, (value, text)
                    found += 1
    assert found > 50


def test_styles_and_masks(made):
    names = [tool["name"] for (split, _), cs in made.items() if split == "train" for c in cs for tool in c["tools"]]
    masked = [n for n in names if n.startswith("func_")]
    assert 0.05 < len(masked) / len(names) < 0.25
    assert any("." in n for n in names) and any("_" in n and "." not in n and n not in masked for n in names)
    assert any(n != n.lower() for n in names)
    assert not set(names) & set(BUILTIN)


def test_parallel_calls_differ_in_one_value_in_all_or_in_their_function(made):
    shapes = Counter()
    for c in made["train", "api_parallel"]:
        calls = c["messages"][1]["tool_calls"]
        differing = {key for call in calls for key in call["arguments"] if call["arguments"][key] != calls[0]["arguments"].get(key)}
        shapes["functions" if len({call["name"] for call in calls}) > 1 else "one value" if len(differing) == 1 else "all"] += 1
        if len(c["messages"]) > 2:
            assert sum(m["role"] == "tool" for m in c["messages"]) == len(calls)
    assert min(shapes[shape] for shape in ("functions", "one value", "all")) >= 15, shapes


def test_offers_come_again_in_training_only(made):
    """The trie computes a shared tool list once, so training reuses lists; scores on the other splits need independent lists."""
    offers = {split: [json.dumps(c["tools"]) for c in data.generate(split, 1200, 0, {kind: 1 for kind in KINDS})]
              for split in ("train", "test")}
    assert len(set(offers["train"])) < 0.87 * 1200 and len(set(offers["test"])) > 0.92 * 1200


def test_questions_back_and_refusals(made):
    for c in made["train", "api_ask"]:
        assert "?" in c["messages"][1]["content"] or "tell me" in c["messages"][1]["content"]
    refused = [c for c in made["train", "api_none"] + made["test", "api_none"] if "." in c["family"]]
    assert 0.5 < len(refused) / 210 < 0.8  # the rest ask for something that a built-in tool does
    # One first word per decision (call, question, refusal): greedy decoding favours a decision that is not split over several first words.
    for kind in ("api_ask", "api_none"):
        assert len({reply.split()[0] for reply in data.corpus("answers.json")["api"][kind.removeprefix("api_")]}) == 1
    near = 0
    for c in refused:
        domain, _, words = c["family"].partition(".")
        offered = {tool["description"] for tool in c["tools"]}
        near += any(offered & set(f["descriptions"]) for d in data.corpus("apis.json")["domains"] if d["name"] == domain
                    for f in d["functions"])
        function = next(f for d in data.corpus("apis.json")["domains"] if d["name"] == domain
                        for f in d["functions"] if "_".join(f["words"]) == words)
        assert not any(tool["description"] in function["descriptions"] for tool in c["tools"])
    assert 0.3 < near / len(refused) < 0.8  # another function of the same domain is offered, but not the requested one


def test_the_seed_decides(made):
    again = data.generate("train", 150, 0, {"api_choice": 1})
    assert json.dumps(again) == json.dumps(made["train", "api_choice"]) != json.dumps(data.generate("train", 150, 1, {"api_choice": 1}))


def test_whole_sentences_say_every_required_value():
    """Each belongs to one function, states each required parameter, and has no slot for a value that is not written as it is."""
    functions = {"_".join(f["words"]): f for d in data.corpus("apis.json")["domains"] for f in d["functions"]}
    writer = data.ApiWriter("train", random.Random(0), False)
    writer.style = "snake"
    assert len(functions) == sum(len(d["functions"]) for d in data.corpus("apis.json")["domains"])
    for name, items in data.corpus("api_sentences.json")["sentences"].items():
        parameters = {data.canonical(p): p for p in functions[name]["parameters"]}
        required = {key for key, p in parameters.items() if p["required"]}
        assert len({str(item) for item in items}) == len(items) >= 4
        for item in items:
            text, told = (item, {}) if isinstance(item, str) else item
            slots = re.findall(r"{(\w+)}", text)
            assert len(set(slots)) == len(slots) and not set(slots) & set(told), (name, text)
            assert required <= set(slots) | set(told) <= set(parameters), (name, text)
            assert not any(parameters[slot]["type"] in ("boolean", "object") for slot in slots), (name, text)
            assert not list(_problems(told, {"type": "object", "properties": {key: writer.field(parameters[key]) for key in told}})), (
                name, text, told)


def test_whole_sentences_are_used():
    """About half of the requests to functions that have whole sentences use one; each value appears in the text as it is written."""
    made = [c for c in data.generate("train", 120, 3, {"api_one": 1}) if not re.search("= |: ", c["messages"][0]["content"])]
    sentences = data.corpus("api_sentences.json")["sentences"]

    def written(c):
        forms = [re.sub(r"\\{\w+\\}", "(.+)", re.escape(text if isinstance(text, str) else text[0]))
                 for text in sentences.get(c["family"].partition(".")[2], [])]
        return any(re.fullmatch(form + "?", c["messages"][0]["content"], re.IGNORECASE) for form in forms)
    whole = [c for c in made if written(c)]
    assert 0.25 < len(whole) / len(made) < 0.65


def test_a_whole_sentence_can_say_an_object_in_its_own_words():
    function = {"words": ["send", "it"], "descriptions": ["Sends it."], "requests": ["Send {..}"], "result": {}, "parameters": [
        {"name": ["to", "whom"], "type": "object", "description": ["who"], "required": True, "properties": [
            {"name": ["full", "name"], "type": "string", "description": ["name"], "required": True, "values": "person",
             "phrases": ["{v}"]}]},
        {"name": ["how", "fast"], "type": "string", "description": ["speed"], "required": False, "enum": ["by_land", "by_air"],
         "phrases": {"by_land": ["slowly"], "by_air": ["fast"]}}]}
    writer = data.ApiWriter("train", random.Random(0), False)
    writer.sentence = lambda f: ("Send it to Bo Lind {how_fast}.", {"to_whom", "how_fast"}, {"to_whom": {"full_name": "Bo Lind"}})
    for style, keys in (("camel", ("toWhom", "fullName", "howFast")), ("snake", ("to_whom", "full_name", "how_fast"))):
        writer.style, writer.masked = style, False
        text, [arguments] = writer.request(function)
        assert arguments == {keys[0]: {keys[1]: "Bo Lind"}, keys[2]: arguments[keys[2]]}
        assert text == f"Send it to Bo Lind {arguments[keys[2]].replace('_', ' ')}."


def test_requests_do_not_contradict_themselves():
    """A rented car is not returned before its pick-up date; "Two things." means two calls; a list is in all calls or in none."""
    seen = 0
    for split in ("train", "test"):
        for row in data.generate(split, 500, 4, {"api_one": 2, "api_choice": 2, "api_parallel": 3}):
            calls = row["messages"][1]["tool_calls"]
            if row["messages"][0]["content"].startswith("Two things."):
                seen, _ = seen + 1, calls[1]
                assert len(calls) == 2, row["messages"][0]["content"]
            for call in calls:
                given = call["arguments"]
                if {"pickup_date", "return_date"} <= set(given):
                    seen += 1
                    assert given["pickup_date"] <= given["return_date"], given
    assert seen > 5


def test_a_list_of_all_there_is_holds_no_stranger():
    rng = random.Random(0)
    writer = data.ApiWriter("train", rng, False)
    planets = ["Mercury", "Venus", "Mars"]
    assert {writer.value(planets)[0] for _ in range(400)} == set(planets)
    assert len({writer.value(["Blue Fern Cafe", "Gadget Barn"])[0] for _ in range(400)}) > 9
