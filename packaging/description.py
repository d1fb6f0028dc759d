"""What a package page shows: README.md without links and pictures of the repository, which a page there cannot follow.

Called by hatchling when it builds a wheel or a source distribution. Once the repository has a public address, it belongs into
`ADDRESS`; then the links lead there.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

ADDRESS = ""  # such as https://forge.example/kvfold/blob/main/, with the last slash
NOTE = "Files that this page names are in the source distribution, docs/ and its pictures among them.\n\n"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


class Description(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = described((Path(self.root) / "README.md").read_text(encoding="utf-8"), ADDRESS)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def described(text: str, address: str) -> str:
    """README's text for a page elsewhere. address: what its relative links are relative to; without one they become words."""

    def one(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if "://" in target:
            return found[0]
        if address:
            target = "README.md" + target if target.startswith("#") else target
            return f"{image}[{words}]({address}{target})"
        return "" if image else words

    made = re.sub(r"\n{3,}", "\n\n", LINK.sub(one, text))
    title, _, rest = made.partition("\n\n")
    return made if address else f"{title}\n\n{NOTE}{rest}"
