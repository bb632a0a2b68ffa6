"""docs/presets.md, made of the presets themselves."""

from __future__ import annotations

import yaml

from molora.presets import PRESETS


def markdown() -> str:
    """The page docs/presets.md."""
    lines = [
        "# Presets",
        "",
        "A published system is a point on the axes router, placement and losses. `molora presets` prints this list,",
        "`molora presets NAME` one of them, `molora presets --markdown` this page.",
        "",
        "```python",
        'config = MoloraConfig.from_preset("dynmole", num_experts=8, router={"entropy_threshold": 0.8})',
        "```",
        "",
        "| preset | system | router | placement | experts x rank |",
        "|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        size = f"{preset.options['num_experts']} x {preset.options['r']}"
        lines.append(f"| [{name}](#{name}) | {preset.title} | `{preset.router}` | `{preset.placement}` | {size} |")
    lines += [
        "",
        "Where a note says *code* or *paper*, that is what the default follows; *molora* marks our own choice.",
    ]
    for name, preset in PRESETS.items():
        lines += ["", f"## {name}", "", f"{preset.title}. Source: {preset.source}.", "", "```yaml", f"preset: {name}"]
        lines += [f"# {line}" for line in yaml.safe_dump(preset.options, sort_keys=False, width=120).splitlines()]
        lines += ["```"]
        if preset.notes:
            lines += ["", *(f"- `{key}`: {note}" for key, note in preset.notes.items())]
    return "\n".join(lines) + "\n"
