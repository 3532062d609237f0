"""The looks of a report page: its colours, as numbers that tests can check, and its style sheet.

Light and dark mode follow the reader's browser; print is always light. Every colour of a text, a line or a mark has
enough contrast in both modes (WCAG 2.1: 4.5 for text, 3 for lines). Nothing is said by colour alone, and scales run
from pale to strong, so that they can be read without colour vision too.
"""
from __future__ import annotations

LEVELS = 20  # a heat-map's colours are numbered 0..LEVELS

MODES = {
    "light": {"page": "#ffffff", "soft": "#f3f5f8", "line": "#d5dae1", "text": "#1b1f24", "quiet": "#57606a",
              "good": "#116329", "bad": "#a40e26", "open": "#6b4c00", "link": "#0550ae"},
    "dark": {"page": "#14181d", "soft": "#1e242b", "line": "#38414c", "text": "#e6eaef", "quiet": "#9aa5b1",
             "good": "#56d47b", "bad": "#ff8f8a", "open": "#e3b341", "link": "#79b8ff"},
}

# One hue from the page's own colour to its opposite: strong means high in both modes.
HEAT = {"light": ("#f1f5fa", "#a9cdf2", "#4a90d9", "#1f5fa8", "#0c2f5e"),
        "dark": ("#1b222b", "#17406e", "#2a6cb0", "#6aaae6", "#d6e8fb")}

# Blue, vermilion, green, purple, ochre, magenta, cyan, grey; hues that are easily confused differ in lightness.
SERIES = {"light": ("#0b62c4", "#c2410c", "#00785a", "#7b3fb5", "#8a6500", "#b0246f", "#007a99", "#555e68"),
          "dark": ("#62adff", "#ff9457", "#35c79b", "#c79bff", "#e0b83c", "#ff86c3", "#45cbe8", "#b3bcc6")}

# A surface's colours, the same in both modes: dark blue over grey to yellow, even in lightness (after cividis,
# Nunez, Anderton and Renslow 2018, which is made for readers with and without colour vision deficiencies).
SURFACE = ("#00224e", "#434e6c", "#7d7c78", "#bcae6c", "#fee838")


def rgb(colour: str) -> tuple[int, int, int]:
    """#rrggbb as three numbers 0..255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def between(anchors: tuple[str, ...], t: float) -> str:
    """The colour at t in 0..1 of a scale through evenly spaced anchors."""
    at = min(max(t, 0.0), 1.0) * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    a, b = rgb(anchors[i]), rgb(anchors[i + 1])
    return "#" + "".join(f"{round(p + (q - p) * (at - i)):02x}" for p, q in zip(a, b, strict=True))


def contrast(a: str, b: str) -> float:
    """The contrast of two colours, 1..21 (WCAG 2.1)."""
    def luminance(colour: str) -> float:
        parts = [c / 255 for c in rgb(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever reads better there."""
    return max(("#000000", "#ffffff"), key=lambda c: contrast(c, background))


def _variables(mode: str) -> str:
    heat = [between(HEAT[mode], i / LEVELS) for i in range(LEVELS + 1)]
    pairs = [*MODES[mode].items(), *((f"s{i}", c) for i, c in enumerate(SERIES[mode])),
             *((f"h{i}", c) for i, c in enumerate(heat)), *((f"i{i}", ink(c)) for i, c in enumerate(heat))]
    return ";".join(f"--{name}:{colour}" for name, colour in pairs)


RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.25rem 1.25rem 3rem;max-width:70rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.25rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3,figcaption,caption{font-size:.95rem;font-weight:600;text-align:left;margin:0 0 .35rem}
p{margin:.4rem 0;max-width:48rem}
a{color:var(--link)}
nav{display:flex;flex-wrap:wrap;gap:.1rem 1rem}
code{font:.92em ui-monospace,"Liberation Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
.verdict{font-size:1.1rem;padding:.6rem .9rem;margin:.75rem 0;background:var(--soft);border-left:4px solid var(--s0);
max-width:none}
.note,.facts,small{color:var(--quiet)}
.note,.facts{font-size:.88rem}
.good{color:var(--good)}.bad{color:var(--bad)}.open{color:var(--open)}
.grid{display:grid;gap:1.25rem 2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));
align-items:start}
.flow{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem}
figure{margin:.75rem 0;min-width:0;max-width:100%}
section>figure+figure,details>figure+figure{margin-top:2rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{padding-bottom:.2rem}
th,td{padding:.3rem .6rem;text-align:right;vertical-align:baseline;white-space:nowrap}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th,tbody td{border-bottom:1px solid var(--line)}
th:first-child{text-align:left}
tbody th{font-weight:500}
thead th:first-child,tbody th:first-child{position:sticky;left:0;background:var(--page);z-index:1}
thead .words,tbody .words{text-align:left}
td.words{white-space:normal;min-width:9rem}td.words b{white-space:nowrap}
td small{display:block;font-weight:400;line-height:1.15;font-size:.76rem}
.best{font-weight:700}
.mark{display:inline-block;width:1.1em;text-align:center}
.heat td,.heat tbody th,.heat thead th{border:2px solid var(--page)}
.heat td{min-width:4.2rem;text-align:center;padding:.4rem .5rem}
.heat td small{color:inherit}
.heat td.own{outline:1.5px solid currentColor;outline-offset:-4px}
.heat thead th+th{text-align:center}.heat tbody th{vertical-align:middle}
.heat td,.scale i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.scale{display:flex;align-items:center;gap:.5rem;font-size:.82rem;color:var(--quiet);margin:.35rem 0}
.scale span{display:inline-flex}
.scale i{width:.55rem;height:.8rem}
svg{display:block;width:100%;height:auto;max-width:34rem;overflow:visible}
svg text{fill:var(--text);font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
svg .tick{fill:var(--quiet);font-size:11px;font-variant-numeric:tabular-nums}
svg .rule{stroke:var(--line);stroke-width:1;fill:none}
svg .axis{stroke:var(--quiet);stroke-width:1;fill:none}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .band{stroke:none;opacity:.16}
svg .hit{fill:transparent;stroke:none}
svg .level{fill:none;stroke:#fff;stroke-width:1;opacity:.85}
svg.relief polygon{stroke:#0006;stroke-width:.5}
svg .halo{stroke:#000;stroke-width:2.2;opacity:.35}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.2rem 0 0;padding:0;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.legend svg{width:34px;height:14px;flex:none}
.checks{list-style:none;margin:.5rem 0;padding:0}
.checks li{display:grid;grid-template-columns:9.5rem 1fr;gap:.1rem .9rem;padding:.45rem 0;
border-bottom:1px solid var(--line)}
.checks b{white-space:nowrap}
.checks span small{display:block;font-size:.88rem}
.images td,.images tbody th{border:0;vertical-align:top;padding:.15rem .2rem}
.images tbody th{vertical-align:middle;padding-right:.6rem;max-width:8.5rem;white-space:normal;line-height:1.25}
.images thead th{text-align:center;border:0;font-weight:500}
.images thead th:first-child{text-align:left}
.images td{text-align:center;font-size:.76rem;line-height:1.2}
.images img{display:block;margin:0 auto .1rem;width:64px;height:64px;object-fit:contain;image-rendering:pixelated;
background:var(--soft)}
.images .large img{width:112px;height:112px}
.images .wrong{color:var(--bad);font-weight:700;text-decoration:underline}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:600;padding:.3rem 0}
.pairs th,.pairs td{text-align:left;white-space:normal;overflow-wrap:anywhere;padding:.2rem .9rem .2rem 0;
font-weight:400}
.pairs th{color:var(--quiet);min-width:8rem}
footer{margin-top:2.5rem;padding-top:.75rem;border-top:1px solid var(--line);color:var(--quiet);font-size:.85rem}
@media (max-width:36rem){body{padding:.9rem .9rem 2rem;font-size:14px}.checks li{grid-template-columns:1fr}
td.words{min-width:0}.scroll:not(.images) tbody th{min-width:6rem}
th,td{padding:.28rem .4rem}tbody th{white-space:normal}.heat td{min-width:3.4rem;padding:.35rem .25rem}
.images img{width:48px;height:48px}.images tbody th{max-width:5.2rem;font-size:.8rem}}
@media print{body{max-width:none;padding:0}nav{display:none}figure,tr{break-inside:avoid}h2{break-after:avoid}
.grid{grid-template-columns:1fr 1fr}.scroll{overflow:visible}}
"""


def sheet() -> str:
    """The whole style sheet of a page."""
    classes = [f".h{i}{{background:var(--h{i});color:var(--i{i})}}" for i in range(LEVELS + 1)]
    classes += [f".s{i}{{stroke:var(--s{i});fill:var(--s{i})}}" for i in range(len(SERIES["light"]))]
    return (f":root{{{_variables('light')}}}\n"
            f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables('dark')}}}}}\n"
            + "\n".join(classes) + RULES)
