"""Links from docs/ to other files of the repository: pictures are copied into the site, other files open on GitHub.

On GitHub the same links work as they stand.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+((?!\.\./)[^)\s]+)\)")
PICTURES = (".svg", ".png")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of analyses/results to the site."""
    for path in sorted((ROOT / "analyses" / "results").iterdir()):
        if path.suffix in PICTURES:
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ to the site's copy, or to the repository."""
    depth = page.file.src_uri.count("/")

    def point(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if (ROOT / "docs" / target).exists():  # from one folder of docs/ to another
            return link[0]
        if target.startswith("analyses/results/") and target.endswith(PICTURES):
            return f"{picture}[{text}]({'../' * depth}results/{Path(target).name})"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/main/{target})"

    return OUTSIDE.sub(point, markdown)
