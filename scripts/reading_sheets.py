"""
Made-up Chinese fact sheets, with questions and short answers about every fact in them.

    python scripts/reading_sheets.py --seed 1 --num_facts 40 --output_dir output/sheet

A sheet tells of goods, people, shops and rules for customers, one line each, one sentence a fact. Every name is put
together from two pools, and every value is drawn, so nothing but the sheet tells which belongs to which. Names that
`is_held_out` stand in no sheet of the training.
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _words(text: str) -> list[str]:
    return text.split()


BRANDS = _words("青松 云海 星河 晨光 白鹿 远山 红枫 蓝湾 金麦 竹影 雪峰 春雨 南风 月桥 石榴 银杏 流萤 飞鸟 麦田 秋水")
GOODS = _words("台灯 茶壶 书桌 背包 雨伞 水杯 毛毯 相机 音箱 手表 帽子 围巾 花瓶 闹钟 耳机 木椅 枕头 风扇 饭盒 皮箱")
SURNAMES = _words("李 王 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 林 何 郭 马 罗")
GIVEN_NAMES = _words("明 华 芳 静 强 磊 洋 艳 勇 杰 娟 涛 超 秀 霞 平 刚 桂 玲 丹 宁 浩 佳 瑞 雯 博 欣 彤 岚 哲")
PLACES = _words("东湖 西门 北桥 城南 江边 山前 河口 新街 老街 古塔 广场 码头 车站 校园 公园 竹林 花园 梅岭 沙洲 龙潭")
SHOPS = _words("书店 药店 面馆 茶馆 花店 鞋店 超市 饭店 酒店 影院 诊所 银行 邮局 球馆 画廊 琴行 网吧 浴池 粮店 布庄")
LEVELS = _words("金卡 银卡 普通 铜卡 钻石 首席 年度 季度 终身 体验 家庭 企业 校园 夜间 周末 假日 海外 同城 老年 青年")
GROUPS = _words("会员 客户 学生 教师 旅客 读者 店主 司机 医生 职工 房客 游客 军人 记者 作者 球员 员工 家长 住户 车主")
CITIES = _words("苏州 杭州 成都 西安 青岛 大连 厦门 昆明 长沙 武汉 福州 贵阳 兰州 桂林 洛阳 扬州 温州 济南 合肥 南昌")
COLORS = _words("白色 黑色 红色 蓝色 绿色 黄色 灰色 紫色 粉色 棕色 橙色 米色 银色 金色 青色 杏色")
MATERIALS = _words("棉布 羊毛 牛皮 松木 玻璃 陶瓷 不锈钢 塑料 亚麻 丝绸 竹子 橡胶 铝 铜 纸 水晶")
DEPARTMENTS = _words(
    "财务部 人事部 市场部 销售部 技术部 客服部 采购部 法务部 设计部 物流部 生产部 宣传部 培训部 质检部"
)
HOBBIES = _words("游泳 下棋 画画 跑步 唱歌 摄影 钓鱼 爬山 书法 跳舞 打球 看书 做饭 养花 骑车 听戏")
UNITS = _words("元 个 月 室 点 折 天")
FACTS_PER_KIND = 20  # or its first words may run out
TITLES = ("服务手册", "店员须知", "客服资料", "内部说明")


@dataclass(frozen=True)
class Attribute:
    """What can be told of a name: the sentences for it, the ways to ask for it, and how a value is drawn."""

    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    draw: Callable[[random.Random], str]


@dataclass(frozen=True)
class Kind:
    """Things that a section tells of, with names from two pools."""

    heading: str
    first: list[str]
    second: list[str]
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence of a sheet, and what can be asked about it."""

    name: str
    sentence: str
    questions: tuple[str, ...]
    answer: str


def _number(least: int, most: int, unit: str, step: int = 1) -> Callable[[random.Random], str]:
    return lambda chooser: f"{chooser.randrange(least, most + 1, step)}{unit}"


def _word(pool: list[str]) -> Callable[[random.Random], str]:
    return lambda chooser: chooser.choice(pool)


def _person(chooser: random.Random) -> str:
    return chooser.choice(SURNAMES) + chooser.choice(GIVEN_NAMES)


_GOODS = (
    Attribute(
        ("{}的价格是{}。", "{}在店里的售价是每件{}。"),
        ("{}的价格是多少？", "{}多少钱？"),
        _number(20, 999, "元"),
    ),
    Attribute(("{}产自{}。", "{}是在{}生产的。"), ("{}产自哪里？", "{}的产地是哪里？"), _word(CITIES)),
    Attribute(("{}的颜色是{}。", "{}现在只有{}这一种颜色。"), ("{}的颜色是什么？", "{}是什么颜色？"), _word(COLORS)),
    Attribute(("{}用{}做成。", "{}的主要材料是{}。"), ("{}用什么做成？", "{}是什么材料？"), _word(MATERIALS)),
    Attribute(
        ("{}保修{}。", "{}从买到之日起保修{}。"), ("{}保修多久？", "{}的保修期是多久？"), _number(3, 60, "个月")
    ),
)
_PEOPLE = (
    Attribute(
        ("{}的电话是{}。", "要找{}请打电话{}。"), ("{}的电话是多少？", "怎么打电话给{}？"), _number(1000, 9999, "")
    ),
    Attribute(("{}在{}工作。", "{}目前在{}上班。"), ("{}在哪个部门工作？", "{}是哪个部门的？"), _word(DEPARTMENTS)),
    Attribute(
        ("{}的房间是{}。", "{}白天都在{}办公。"), ("{}的房间是多少？", "在哪个房间能找到{}？"), _number(101, 959, "室")
    ),
    Attribute(("{}来自{}。", "{}的老家是{}。"), ("{}来自哪里？", "{}是哪里人？"), _word(CITIES)),
    Attribute(("{}喜欢{}。", "{}平时最大的爱好是{}。"), ("{}喜欢什么？", "{}的爱好是什么？"), _word(HOBBIES)),
)
_SHOPS = (
    Attribute(("{}{}开门。", "{}每天早上{}开门。"), ("{}几点开门？", "{}什么时候开门？"), _number(5, 12, "点")),
    Attribute(("{}的店长是{}。", "{}现在由{}担任店长。"), ("{}的店长是谁？", "谁是{}的店长？"), _person),
    Attribute(
        ("{}的电话是{}。", "要找{}请打电话{}。"), ("{}的电话是多少？", "怎么打电话给{}？"), _number(1000, 9999, "")
    ),
    Attribute(("{}有{}座位。", "{}一共有{}座位。"), ("{}有多少座位？", "{}的座位有多少？"), _number(10, 99, "个")),
)
_RULES = (
    Attribute(("{}可以打{}。", "{}买任何商品都打{}。"), ("{}可以打几折？", "{}的折扣是多少？"), _number(61, 99, "折")),
    Attribute(
        ("{}满{}免运费。", "{}一次买满{}就免运费。"),
        ("{}满多少免运费？", "{}买多少可以免运费？"),
        _number(50, 990, "元", 10),
    ),
    Attribute(
        ("{}要在{}内退货。", "{}如果要退货必须在{}内。"),
        ("{}要在多久内退货？", "{}的退货期限是多久？"),
        _number(3, 60, "天"),
    ),
    Attribute(
        ("{}每月送{}积分。", "{}每个月可以得到{}积分。"),
        ("{}每月送多少积分？", "{}每月的积分是多少？"),
        _number(20, 900, "", 10),
    ),
)
KINDS = (
    Kind("商品", BRANDS, GOODS, _GOODS),
    Kind("人员", SURNAMES, GIVEN_NAMES, _PEOPLE),
    Kind("门店", PLACES, SHOPS, _SHOPS),
    Kind("规定", LEVELS, GROUPS, _RULES),
)


@dataclass(frozen=True)
class Sheet:
    """A text, and the facts in it."""

    text: str
    facts: tuple[Fact, ...]


def is_held_out(name: str) -> bool:
    """Whether a name is left to the sheets that no training has seen: one in five is."""
    return zlib.crc32(name.encode()) % 5 == 0


def draw_sheet(chooser: random.Random, num_facts: int, held_out: bool = False, whole: bool = True) -> Sheet:
    """
    Draws a sheet, in which names of one kind differ in their first word.

    Args:
        num_facts: the number of facts; at most 80.
        held_out: whether its names are those that are held out, or those of the training.
        whole: whether it has a title, and one section for each kind of things; a part of a sheet has neither.
    """
    fewest = -(-num_facts // FACTS_PER_KIND)
    kinds = KINDS if whole else chooser.sample(KINDS, chooser.randint(fewest, len(KINDS)))
    least = 2 if whole else 1
    lines: dict[str, list[list[Fact]]] = {}
    used: set[tuple[str, str]] = set()
    left = num_facts
    while left:
        kind = chooser.choice(kinds)
        first = chooser.choice(kind.first)
        name = first + chooser.choice(kind.second)
        if (kind.heading, first) in used or is_held_out(name) != held_out:
            continue
        used.add((kind.heading, first))
        count = min(left, chooser.randint(least, len(kind.attributes)))
        told = [_state(chooser, name, attribute) for attribute in chooser.sample(kind.attributes, count)]
        lines.setdefault(kind.heading, []).append(told)
        left -= count
    return _write(chooser, lines, whole)


def _state(chooser: random.Random, name: str, attribute: Attribute) -> Fact:
    value = attribute.draw(chooser)
    questions = tuple(question.format(name) for question in attribute.questions)
    return Fact(name, chooser.choice(attribute.sentences).format(name, value), questions, value)


def _write(chooser: random.Random, lines: dict[str, list[list[Fact]]], whole: bool) -> Sheet:
    headings = chooser.sample(list(lines), len(lines))
    written = [f"# {chooser.choice(TITLES)}"] if whole else []
    for heading in headings:
        written += [f"## {heading}"] if whole else []
        written += ["".join(fact.sentence for fact in line) for line in lines[heading]]
    return Sheet("\n".join(written), tuple(fact for heading in headings for line in lines[heading] for fact in line))


def all_texts() -> list[str]:
    """Every word of a pool and every part of a sentence or question: what the tokenizer has to have words for."""
    pools = (BRANDS, GOODS, SURNAMES, GIVEN_NAMES, PLACES, SHOPS, LEVELS, GROUPS, CITIES, COLORS, MATERIALS)
    texts = [word for pool in (*pools, DEPARTMENTS, HOBBIES) for word in pool]
    texts += [*TITLES, *(kind.heading for kind in KINDS), *UNITS, "0123456789#"]
    wordings = [[*a.sentences, *a.questions] for kind in KINDS for a in kind.attributes]
    return texts + [part for each in wordings for wording in each for part in wording.split("{}") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a sheet with held-out names, and a question about each fact.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for sheet.md and questions.jsonl.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    parser.add_argument("--num_facts", type=int, default=45, help="Default: 45, which is some 500 tokens.")
    options = parser.parse_args()
    chooser = random.Random(options.seed)
    sheet = draw_sheet(chooser, options.num_facts, held_out=True)
    rows = [{"content": chooser.choice(fact.questions), "summary": fact.answer} for fact in sheet.facts]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "sheet.md").write_text(sheet.text + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (options.output_dir / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
