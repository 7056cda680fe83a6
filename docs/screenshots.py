"""Screenshots of a run's report for docs/report.md: two widths, both themes, as PNG with a palette.

`python docs/screenshots.py runs/demo`. Needs playwright and Pillow (`pip install playwright pillow`) and a chromium.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright


NUM_COLOURS = 128


def main(run_dir: Path, output_dir: Path) -> None:
    page = run_dir / "samples.html"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not page.is_file() or chromium is None:
        sys.exit(
            f"error: {f'{page} does not exist; run `skd report {run_dir}`' if chromium else 'there is no chromium'}."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        texts = shot(browser, page, 1400, "light", "body", 760)
        figures = shot(browser, page, 1400, "light", "#figures", 1330)
        samples = shot(browser, page, 1400, "dark", "#progress", 700)
        phone = beside(*(shot(browser, page, 400, theme, at, 900) for theme, at in PHONE))
        browser.close()
    pictures = {"texts": texts, "figures": figures, "samples": samples, "phone": phone}
    for name, picture in pictures.items():
        target = output_dir / f"report_{name}.png"
        picture.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
        print(f"{target}: {picture.width} x {picture.height}, {target.stat().st_size // 1024} KB")


# What the picture of a phone shows: a theme, and the element that is on top.
PHONE = (("light", "body"), ("dark", "#figures"), ("dark", "#samples"))


def shot(browser: Browser, page: Path, width: int, theme: str, at: str, height: int) -> Image.Image:
    """The page from the element `at` on."""
    view = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
    view.goto(page.resolve().as_uri())
    view.evaluate(
        "at => window.scrollTo(0, document.querySelector(at).getBoundingClientRect().top - (at == 'body' ? 0 : 55))",
        at,
    )
    picture = Image.open(io.BytesIO(view.screenshot())).convert("RGB")
    view.close()
    return picture


def beside(*pictures: Image.Image) -> Image.Image:
    gap = 16
    whole = Image.new(
        "RGB", (sum(one.width for one in pictures) + gap * (len(pictures) - 1), pictures[0].height), "#808080"
    )
    for number, one in enumerate(pictures):
        whole.paste(one, (number * (one.width + gap), 0))
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="output directory of a run that has a report")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "images")
    options = parser.parse_args()
    main(options.run_dir, options.output_dir)
