"""The look of the report: one style sheet for light and dark, narrow and wide."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2329; --soft: #5b6672; --line: #dde2e8;
  --before: #9a6412; --after: #2360b0; --heat: #2360b0; --good: #1f7a4d; --bad: #b3372f; --code: #eef1f4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1c2127; --ink: #e6eaee; --soft: #9aa6b2; --line: #333b44;
    --before: #e0a84e; --after: #7db2f5; --heat: #5b9bed; --good: #63c592; --bad: #ef8b82; --code: #252b32; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 72px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 20px 0 4px; }
p { margin: 4px 0 12px; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
.found { list-style: none; margin: 8px 0 0; padding: 0; }
.found li { padding: 7px 0; border-top: 1px solid var(--line); }
.found li:first-child { border: 0; }
figure { margin: 0; overflow-x: auto; }
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; text-align: left; }
tbody th.before { color: var(--before); font-weight: 600; }
tbody th.after, tbody th.model { color: var(--after); font-weight: 600; }
th:first-child { text-align: left; }
tr:last-child > * { border-bottom: 0; }
.better { color: var(--good); } .worse { color: var(--bad); }
.facts td, .facts th { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts .changed td { font-weight: 600; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 18px; }
.heat { border-collapse: separate; border-spacing: 3px; table-layout: fixed; }
.heat th, .heat td { border: 0; text-align: center; padding: 7px 4px; }
.heat tbody th { text-align: right; color: var(--soft); white-space: nowrap; }
.heat td { border-radius: 5px; background: color-mix(in oklab, var(--heat) var(--share), var(--code)); }
.heat td.deep { color: #fff; }
@media (prefers-color-scheme: dark) { .heat td.deep { color: #0b1016; } }
.chart { display: block; width: 100%; min-width: 520px; height: auto; margin: 8px 0; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.chart .label { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: var(--line); } .chart .mark { stroke: var(--soft); stroke-dasharray: 3 4; }
.chart .line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.chart .line.before { stroke: var(--before); } .chart .line.after, .chart .line.model { stroke: var(--after); }
.chart .dot { stroke: var(--card); stroke-width: 1.5; }
.chart .dot.before, .chart .label.before { fill: var(--before); }
.chart .dot.after, .chart .label.after, .chart .dot.model, .chart .label.model { fill: var(--after); }
pre { background: var(--code); border-radius: 7px; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86rem; margin: 6px 0 14px; }
code { font-family: ui-monospace, monospace; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""  # noqa: E501
