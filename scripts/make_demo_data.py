"""
Writes the demo data: made-up product lines in ADGEN's shape, one JSON object a line with `content` and `summary`.

    python scripts/make_demo_data.py --output_dir examples/demo

The same seed gives the same lines. The words and sentences are this project's own.
"""

import argparse
import json
import random
from pathlib import Path

SPLITS = {"train": 200, "validation": 40, "test": 40}

MATERIALS = ("棉麻", "羊毛", "牛仔布", "雪纺", "灯芯绒", "亚麻")
COLORS = ("白色", "黑色", "米色", "雾蓝", "墨绿", "砖红", "浅灰")
STYLES = ("简约", "复古", "通勤", "休闲", "文艺", "运动")
PATTERNS = ("纯色", "条纹", "格子", "碎花", "刺绣", "波点")
GARMENTS = {
    "上衣": (("衣样式", ("衬衫", "外套", "针织衫", "卫衣")), ("衣领型", ("圆领", "翻领", "立领"))),
    "裤": (("裤型", ("直筒裤", "阔腿裤", "小脚裤")), ("裤腰型", ("高腰", "松紧腰", "中腰"))),
    "裙": (("裙型", ("百褶裙", "半身裙", "连衣裙")), ("裙长", ("短裙", "中长裙", "长裙"))),
}
STYLE_SENTENCES = {
    "简约": "线条干净，没有多余的装饰",
    "复古": "像从旧相册里走出来的一样",
    "通勤": "上班路上穿着它，精神又得体",
    "休闲": "周末出门随手一套，轻松自在",
    "文艺": "适合带一本书，在窗边坐一个下午",
    "运动": "跑跳之间也不觉得拘束",
}
MATERIAL_SENTENCES = {
    "棉麻": "透气吸汗，夏天也清爽",
    "羊毛": "厚实保暖，摸起来很软",
    "牛仔布": "结实耐磨，越洗越有味道",
    "雪纺": "轻轻薄薄，走动时很飘逸",
    "灯芯绒": "纹路清楚，秋冬穿最合适",
    "亚麻": "自然的褶皱，看着就凉快",
}
OPENINGS = ("这款{color}的{cut}", "一件{color}{cut}", "我们新做的{color}{cut}")
PATTERN_SENTENCES = (
    "用{pattern}点缀，耐看不腻",
    "{pattern}的图案落在身前，很有精神",
    "整件是{pattern}，搭什么都不出错",
)
CUT_SENTENCES = ("{detail}的设计衬出好身形", "{detail}剪裁，站着坐着都舒服")


def product_row(chooser: random.Random) -> dict[str, str]:
    """One made-up product: its attributes as `content`, and a text that mentions each of them as `summary`."""
    garment = chooser.choice(sorted(GARMENTS))
    (cut_name, cuts), (detail_name, details) = GARMENTS[garment]
    words = {
        "material": chooser.choice(MATERIALS),
        "color": chooser.choice(COLORS),
        "style": chooser.choice(STYLES),
        "pattern": chooser.choice(PATTERNS),
        "cut": chooser.choice(cuts),
        "detail": chooser.choice(details),
    }
    names = {
        "材质": "material",
        "颜色": "color",
        "风格": "style",
        "图案": "pattern",
        cut_name: "cut",
        detail_name: "detail",
    }
    content = "*".join([f"类型#{garment}", *(f"{name}#{words[key]}" for name, key in names.items())])
    return {"content": content, "summary": _summary(words, chooser)}


def _summary(words: dict[str, str], chooser: random.Random) -> str:
    opening = chooser.choice(OPENINGS) + "，" + STYLE_SENTENCES[words["style"]]
    material = words["material"] + MATERIAL_SENTENCES[words["material"]]
    sentences = [opening, material, chooser.choice(PATTERN_SENTENCES), chooser.choice(CUT_SENTENCES)]
    return "".join(sentence.format(**words) + "。" for sentence in sentences)


def product_rows(count: int, seed: int) -> list[dict[str, str]]:
    """
    `count` different products; the same `seed` gives the same rows.

    Rows are different in `content`, so that no line of one split can be met in another that is cut from the same list.
    """
    chooser = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = product_row(chooser)
        rows.setdefault(row["content"], row)
    return list(rows.values())


def write_demo_data(output_dir: Path, seed: int = 0) -> list[Path]:
    """Writes `train.json`, `validation.json` and `test.json` (JSON lines, UTF-8) and returns their paths."""
    rows = iter(product_rows(sum(SPLITS.values()), seed))
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, count in SPLITS.items():
        lines = [json.dumps(next(rows), ensure_ascii=False) for _ in range(count)]
        paths.append(output_dir / f"{split}.json")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up product lines in ADGEN's shape.")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/demo"), help="Folder to write the files to.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choices; the same seed gives the same lines.")
    arguments = parser.parse_args()
    for path in write_demo_data(arguments.output_dir, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
