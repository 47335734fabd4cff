#!/usr/bin/env bash
# Creates .venv with everything that Toolplay needs; instant when all of it is installed.
#   ./setup.sh          the project and its tests
#   ./setup.sh --test   also the extras that a few tests compare with (peft, wandb, matplotlib, bfcl-eval)
set -euo pipefail
cd "$(dirname "$0")"

want="requirements.txt"
case "${1:-}" in
  "") ;;
  --test) want="requirements.txt requirements-test.txt" ;;
  *) echo "setup.sh: unknown option $1; there is only --test" >&2; exit 2 ;;
esac
stamp=".venv/toolplay-installed"
have() { [ -f "$stamp" ] && for f in $want; do grep -qxF "$f $(cksum < "$f")" "$stamp" || return 1; done && .venv/bin/python - $want 2> /dev/null << 'EOF'
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for name in sys.argv[1:]:
    for line in open(name):
        if line := line.partition("#")[0].strip():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate():  # a removed or changed package is installed again
                assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
EOF
}
have && exit 0

fits() { command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; }
python="${PYTHON:-}"
if [ -z "$python" ]; then
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if fits "$name"; then python="$name"; break; fi
  done
elif ! fits "$python"; then
  echo "setup.sh: PYTHON=$python is not a Python 3.10 to 3.13" >&2; exit 2
fi
[ -n "$python" ] || { echo "setup.sh: no Python 3.10 to 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 ./setup.sh" >&2; exit 2; }

# If .venv has no pip, its creation was interrupted or the venv package was missing: create it again.
{ .venv/bin/python -m pip --version > /dev/null 2>&1 && fits .venv/bin/python; } || "$python" -m venv --clear .venv || {
  echo "setup.sh: cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
for f in $want; do
  echo "setup.sh: installing $f"
  # Packages below "# no-deps" would also install packages that Toolplay does not need (llama.cpp, many web clients).
  sed -n '/^# no-deps$/,$!p' "$f" > .venv/with-deps.txt
  sed -n '/^# no-deps$/,$p' "$f" > .venv/no-deps.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r .venv/with-deps.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r .venv/no-deps.txt
done
echo "setup.sh: checking everything; the first time, this converts the model's weights"
.venv/bin/python toolplay.py validate > .venv/validate.txt || { grep -v "^  ok" .venv/validate.txt >&2 || true; exit 2; }
for f in $want; do echo "$f $(cksum < "$f")"; done > "$stamp"
echo "setup.sh: done. Next: .venv/bin/python toolplay.py"
