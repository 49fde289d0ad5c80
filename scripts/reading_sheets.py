"""
Made-up Chinese fact sheets, with questions and short answers about every fact in them.

    python scripts/reading_sheets.py --seed 1 --num_facts 55 --output_dir output/sheet

A sheet tells of goods, people, shops and rules for customers, one line each, one sentence a fact. Every name is put
together from two pools, and every value is drawn, so nothing but the sheet tells which belongs to which. Names that
`is_held_out` stand in no sheet of the training. A question ends as the sentence that answers it begins, with the name
and what is asked of it: a network of a few layers finds no more than that.
"""

import argparse
import json
import random
import zlib
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
UNITS = _words("元 月 室 号 折 天 分 个 米")
NUMBERS = [str(number) for number in range(10, 100)]
FACTS_PER_KIND = 19  # or its first words may run out: two kinds share one
TITLES = ("服务手册", "店员须知", "客服资料", "内部说明")
SENTENCE = "{}的{}是{}。"
QUESTIONS = ("{}的{}？", "我想知道{}的{}？", "请问{}的{}？")


@dataclass(frozen=True)
class Kind:
    """Things that a section tells of: names from two pools, and the values that each of their attributes can have."""

    heading: str
    first: list[str]
    second: list[str]
    attributes: dict[str, list[str]]


@dataclass(frozen=True)
class Fact:
    """A sentence of a sheet, and what can be asked about it."""

    name: str
    attribute: str
    answer: str

    @property
    def sentence(self) -> str:
        """Return the sentence of the sheet."""
        return SENTENCE.format(self.name, self.attribute, self.answer)

    @property
    def questions(self) -> tuple[str, ...]:
        """Return the ways to ask for the answer; the reading model answers all, and never writes the last itself."""
        return tuple(question.format(self.name, self.attribute) for question in QUESTIONS)


def _numbers(unit: str) -> list[str]:
    return [number + unit for number in NUMBERS]


KINDS = (
    Kind(
        "商品",
        BRANDS,
        GOODS,
        {"价格": _numbers("元"), "产地": CITIES, "颜色": COLORS, "材料": MATERIALS, "保修期": _numbers("月")},
    ),
    Kind(
        "人员",
        SURNAMES,
        GIVEN_NAMES,
        {"分机": _numbers("号"), "部门": DEPARTMENTS, "房间": _numbers("室"), "家乡": CITIES, "爱好": HOBBIES},
    ),
    Kind(
        "门店",
        PLACES,
        SHOPS,
        {"门牌": _numbers("号"), "座位": _numbers("个"), "城市": CITIES, "距离": _numbers("米")},
    ),
    Kind(
        "规定",
        LEVELS,
        GROUPS,
        {"折扣": _numbers("折"), "退货期": _numbers("天"), "积分": _numbers("分"), "礼品": GOODS},
    ),
)


@dataclass(frozen=True)
class Sheet:
    """A text, and the facts in it."""

    text: str
    facts: tuple[Fact, ...]


def is_held_out(name: str) -> bool:
    """Whether a name is left to the sheets that no training has seen: one in five is."""
    return zlib.crc32(name.encode()) % 5 == 0


def draw_sheet(
    chooser: random.Random, num_facts: int, held_out: bool = False, whole: bool = True, alike: bool = False
) -> Sheet:
    """
    Draws a sheet, in which names differ in their first word.

    Args:
        num_facts: the number of facts; at most 76.
        held_out: whether its names are those that are held out, or those of the training.
        alike: whether it tells the same one thing of all names of a kind, so that names alone tell its facts apart.
        whole: whether it has a title, and one section for each kind of things; a part of a sheet has neither.
    """
    fewest = -(-num_facts // FACTS_PER_KIND)
    kinds = KINDS if whole else chooser.sample(KINDS, chooser.randint(fewest, len(KINDS)))
    attributes = {kind.heading: list(kind.attributes) for kind in kinds}
    if alike:
        attributes = {heading: [chooser.choice(names)] for heading, names in attributes.items()}
    least = 2 if whole and not alike else 1
    lines: dict[str, list[list[Fact]]] = {}
    used: set[str] = set()
    left = num_facts
    while left:
        kind = chooser.choice(kinds)
        first = chooser.choice(kind.first)
        name = first + chooser.choice(kind.second)
        if first in used or is_held_out(name) != held_out:
            continue
        used.add(first)
        count = min(left, chooser.randint(least, len(attributes[kind.heading])))
        chosen = chooser.sample(attributes[kind.heading], count)
        told = [Fact(name, attribute, chooser.choice(kind.attributes[attribute])) for attribute in chosen]
        lines.setdefault(kind.heading, []).append(told)
        left -= count
    return _write(chooser, lines, whole)


def _write(chooser: random.Random, lines: dict[str, list[list[Fact]]], whole: bool) -> Sheet:
    headings = chooser.sample(list(lines), len(lines))
    written = [f"# {chooser.choice(TITLES)}"] if whole else []
    for heading in headings:
        written += [f"## {heading}"] if whole else []
        written += ["".join(fact.sentence for fact in line) for line in lines[heading]]
    return Sheet("\n".join(written), tuple(fact for heading in headings for line in lines[heading] for fact in line))


def all_texts() -> list[str]:
    """Every word of a pool and every part of a sentence or question: what the tokenizer has to have words for."""
    pools = [pool for kind in KINDS for pool in (kind.first, kind.second, list(kind.attributes))]
    values = (CITIES, COLORS, MATERIALS, DEPARTMENTS, HOBBIES, UNITS, NUMBERS)
    texts = [word for pool in (*pools, *values) for word in pool]
    texts += [*TITLES, *(kind.heading for kind in KINDS), *"0123456789#"]  # digits one by one: other numbers have more
    return texts + [part for wording in (SENTENCE, *QUESTIONS) for part in wording.split("{}") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a sheet with held-out names, and a question about each fact.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for sheet.md and questions.jsonl.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    parser.add_argument("--num_facts", type=int, default=55, help="Default: 55, which is some 500 tokens.")
    options = parser.parse_args()
    chooser = random.Random(options.seed)
    sheet = draw_sheet(chooser, options.num_facts, held_out=True)
    rows = [{"content": fact.questions[-1], "summary": fact.answer} for fact in sheet.facts]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "sheet.md").write_text(sheet.text + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (options.output_dir / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
