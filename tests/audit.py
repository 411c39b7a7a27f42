"""Known vulnerabilities of what is installed here, by pip-audit: `python -m tests.audit`.

It fails if there are any. Where no vulnerability service answers, it says so and does not.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    ran = subprocess.run([*command, "--skip-editable"], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError):
        packages = []
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        told = "it knows none of them" if packages else ran.stderr.strip().splitlines()[-1:]
        print(f"dependencies were NOT audited: no vulnerability service answers ({told})")
        return 0
    found = [(package, known) for package in audited for known in package["vulns"]]
    for package, known in found:
        fixed = ", ".join(known["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {known['id']}, fixed in {fixed}")
    print(f"{len(audited)} of {len(packages)} packages audited, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
