"Was every pin audited? python tests/audited.py audit.json, which `pip-audit -f json` has written"
import json
import re
import sys
from pathlib import Path


def counts(audit, constraints):
    "How many packages are pinned, and how many of them pip-audit has looked up"
    pinned = {re.split('==', line)[0].strip() for line in constraints.splitlines() if '==' in line and not line.startswith('#')}
    looked_up = {package['name'] for package in audit['dependencies'] if 'skip_reason' not in package}
    return len(pinned), len(looked_up)


if __name__ == '__main__':
    pinned, looked_up = counts(json.loads(Path(sys.argv[1]).read_text()), Path('constraints.txt').read_text(encoding='utf-8'))
    print(f'{looked_up} of {pinned} pinned packages audited')
    sys.exit(looked_up < .95*pinned) # a package that PyPI does not have, such as a local build, cannot be audited
