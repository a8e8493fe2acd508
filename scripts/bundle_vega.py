"""Writes mme/report/assets/vega.min.js, the scripts that draw a report's charts, from the pinned vl-convert-python.

Run it after changing the pin of vl-convert-python in requirements/dev.txt:

    .venv/bin/python scripts/bundle_vega.py
"""

from __future__ import annotations

from pathlib import Path

import vl_convert

BUNDLE = Path(__file__).resolve().parents[1] / "mme" / "report" / "assets" / "vega.min.js"


# In 6.4 the tooltip of a text field shows "undefined" on the mark nearest to the pointer.
VEGA_LITE = "6.1"


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, which set ``window.vegaEmbed``."""
    return vl_convert.javascript_bundle(vl_version=VEGA_LITE)


if __name__ == "__main__":
    BUNDLE.write_text(bundle(), encoding="utf-8")
    print(
        f"wrote {BUNDLE} (Vega {vl_convert.get_vega_version()}, Vega-Lite {VEGA_LITE}, Vega-Embed {vl_convert.get_vega_embed_version()})"
    )
