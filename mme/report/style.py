"""The style sheet of report.html, for light and dark screens and for print."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #667085; --grid: #e3e7ed; --heat: #2563eb; --warn: #b45309;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #9333ea; --c4: #dc2626; --c5: #0891b2; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11151c; --card: #1a2029; --text: #e6eaf0; --soft: #98a2b3; --grid: #2d3644; --heat: #3b82f6; --warn: #fbbf24;
  --c0: #60a5fa; --c1: #fbbf24; --c2: #34d399; --c3: #c084fc; --c4: #f87171; --c5: #22d3ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; }
h2 { margin: 0 0 12px; font-size: 18px; }
h3 { margin: 0 0 6px; font-size: 14px; color: var(--soft); }
header p { margin: 4px 0 18px; color: var(--soft); }
section, .tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
section { padding: 18px 20px; margin-top: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { flex: 1 1 130px; padding: 12px 16px; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.tile b { font-size: 22px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: right; border-bottom: 1px solid var(--grid); font-weight: normal; }
th:first-child { text-align: left; }
.results tr:first-child > th { color: var(--soft); }
.results { width: 100%; }
.results tr:nth-child(2) > * { font-weight: 650; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { color: var(--soft); vertical-align: top; white-space: nowrap; }
.heat { width: 100%; border-spacing: 2px; border-collapse: separate; }
.heat th { border: 0; padding: 4px 8px; white-space: nowrap; font-size: 13px; }
.heat tr:first-child th { text-align: center; }
.heat td { border: 0; border-radius: 4px; padding: 5px 6px; text-align: center; font-size: 13px;
  background: color-mix(in srgb, var(--heat) var(--s), transparent); }
.heat td.strong { color: #fff; }
.note { color: var(--soft); font-size: 13px; margin: 10px 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll + .charts { margin-top: 22px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 20px; }
.columns { display: flex; flex-wrap: wrap; gap: 20px 48px; }
.columns > div { flex: 1 1 320px; min-width: 0; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; font-size: 14px; }
.legend span { color: var(--soft); margin-left: 14px; font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--grid); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .faint { fill: none; stroke-width: 1; opacity: .35; }
.warn { border-color: var(--warn); }
.warn h2 { color: var(--warn); }
.warn ul { margin: 0; padding-left: 20px; }
pre { margin: 0; padding: 12px 14px; overflow-x: auto; background: var(--page); border-radius: 8px; font-size: 13px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 8px; }
code { font-size: 12px; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
