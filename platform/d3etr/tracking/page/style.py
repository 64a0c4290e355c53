"""How the comparison's page looks: light or dark as the reader has it, from phone to desktop."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = (
    ("#0067a5", "#5cb3f0"),
    ("#6b6b6b", "#a9a9a9"),
    ("#c75000", "#ff9147"),
    ("#00825f", "#35cfa2"),
    ("#a34a80", "#e79ac8"),
    ("#0b7b8a", "#5fd0df"),
    ("#8a6100", "#e6bb2e"),
    ("#222222", "#f2f2f2"),
)
"""(on a light, on a dark ground) of one group of runs each; the first three are those of
teacher, plain student and distilled student in all figures."""
DASHES = ("", "7 4", "2 4")
OWN = {"teacher": 0, "plain student": 1}
DISTILLED = 2


def styles_of(titles: Sequence[str]) -> list[tuple[int, str]]:
    """(index into ``COLOURS``, dashes) of each group: no two alike while there are enough.

    Args:
        titles: teacher, plain student, D3ETR student.
    """
    wanted = [OWN.get(title, DISTILLED) for title in titles]
    first = {colour: wanted.index(colour) for colour in set(wanted)}
    others = [index for index in range(len(COLOURS)) if index not in set(wanted)]
    chosen: list[tuple[int, str]] = []
    spare = 0
    for place, colour in enumerate(wanted):
        if first[colour] == place:
            chosen.append((colour, DASHES[0]))
            continue
        turn, index = divmod(spare, max(1, len(others)))
        chosen.append((others[index], DASHES[turn % len(DASHES)]))
        spare += 1
    return chosen


def _palette(dark: bool) -> str:
    return "".join(f".s{i}{{--c:{pair[dark]}}}" for i, pair in enumerate(COLOURS))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1d1d1f; --quiet: #5f6064; --ground: #fff;
  --panel: #f6f6f7; --line: #dedee2; --right: #00825f; --wrong: #b3261e; --note: #fff4d6; }}
{_palette(False)}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: #ececf0; --quiet: #a6a7ad; --ground: #141416; --panel: #1e1e22; --line: #36363c;
  --right: #35cfa2; --wrong: #ff8a80; --note: #3a300f; }}
{_palette(True)} }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--ground); margin: 0; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.2rem 3rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .3rem; }}
p {{ margin: .3rem 0; max-width: 46rem; }} .quiet, figcaption, caption {{ color: var(--quiet); }}
.note {{ background: var(--note); padding: .5rem .8rem; border-radius: .4rem; margin: .6rem 0; }}
.wide {{ overflow-x: auto; margin: .6rem 0; }} .wide:focus-visible {{ outline: 2px solid; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ padding: .35rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: normal; }}
thead th {{ font-weight: 600; color: var(--quiet); vertical-align: bottom; }}
th:first-child {{ text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--ground); max-width: 50vw; white-space: normal; }}
td.best {{ font-weight: 700; }}
td.bar {{ background: linear-gradient(to right, color-mix(in srgb, var(--c) 26%, transparent)
  calc(var(--v) * 1%), transparent 0); border-left: .5rem solid var(--ground); min-width: 7rem; }}
.settings td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem;
  font-family: ui-monospace, monospace; font-size: .86rem; vertical-align: top; }}
.settings thead th {{ text-align: left; }}
.settings tbody th {{ font-family: ui-monospace, monospace; font-size: .86rem;
  white-space: normal; overflow-wrap: anywhere; min-width: 9rem; vertical-align: top; }}
.settings td.other {{ background: var(--panel); }}
.swatch {{ width: 1.6rem; height: .7rem; margin-right: .45rem; vertical-align: middle; }}
.swatch line, .curve {{ stroke: var(--c); fill: none; stroke-width: 2.5; }}
.legend {{ list-style: none; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.4rem; font-size: .94rem; }}
svg text {{ fill: var(--quiet); font-size: 12px; }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
.level {{ stroke-dasharray: 9 5; stroke-width: 1.8; }}
.dot {{ fill: var(--c); }} .spread {{ fill: var(--c); opacity: .16; }}
.chart {{ width: 100%; height: auto; display: block; max-width: 52rem; }}
.small {{ display: none; }}
@media (max-width: 40rem) {{ .large {{ display: none; }} .small {{ display: block; }}
  main {{ padding: 1rem .8rem 2rem; }} h1 {{ font-size: 1.3rem; }}
  th, td {{ padding: .3rem .55rem; }} }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; color: var(--quiet); }}
.scene {{ margin: 1.1rem 0; }}
.panels {{ display: grid; gap: .8rem; margin-top: .3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(11rem, 44vw), 1fr)); }}
.panel {{ margin: 0; font-size: .86rem; }} .panel figcaption {{ line-height: 1.35; }}
.panel strong {{ color: var(--ink); font-weight: 600; display: block; }}
.panel svg {{ width: 100%; height: auto; display: block; border-radius: .3rem;
  background: var(--panel); max-height: 26rem; }}
.sharp {{ image-rendering: pixelated; }}
.box {{ fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }}
.rim {{ stroke: #111; stroke-width: 4.5; opacity: .7; }}
.right, .truth {{ stroke: #5dffc0; }} .wrong {{ stroke: #ff6b5e; stroke-dasharray: 5 3; }}
.panel svg text {{ fill: #fff; stroke: #111; stroke-width: .22em; paint-order: stroke;
  font-weight: 600; }}
.absent {{ display: grid; place-items: center; aspect-ratio: 1; background: var(--panel);
  border-radius: .3rem; color: var(--quiet); padding: .6rem; text-align: center; }}
@media print {{ .wide {{ overflow: visible; }} }}
"""
