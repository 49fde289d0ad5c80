"""
The words and sentences of the demo: made-up products, and the manners in which a text can tell of one.

A manner is a row of parts, each with one or more wordings. A wording may use the product's attributes (`{color}`,
`{material}`, …) and what belongs to them in that manner (`{quality}` to the material, `{simile}` to the colour,
`{occasion}` and `{mood}` to the style). The words and sentences are this project's own.
"""

GARMENTS = {
    "上衣": (("衣样式", ("衬衫", "外套", "针织衫", "卫衣")), ("衣领型", ("圆领", "翻领", "立领"))),
    "裤": (("裤型", ("直筒裤", "阔腿裤", "小脚裤")), ("裤腰型", ("高腰", "松紧腰", "中腰"))),
    "裙": (("裙型", ("百褶裙", "半身裙", "连衣裙")), ("裙长", ("短款", "中长款", "长款"))),
}
PATTERNS = ("纯色", "条纹", "格子", "碎花", "刺绣", "波点")
QUALITIES = {
    "棉麻": "透气吸汗",
    "羊毛": "厚实保暖",
    "牛仔布": "结实耐磨",
    "雪纺": "轻薄飘逸",
    "灯芯绒": "柔软挺括",
    "亚麻": "清凉自然",
}
SIMILES = {
    "白色": "如初雪",
    "黑色": "如深夜",
    "米色": "如细沙",
    "雾蓝": "如远山",
    "墨绿": "如古松",
    "砖红": "如晚霞",
    "浅灰": "如薄云",
}
OCCASIONS = {
    "简约": "在家看书",
    "复古": "去看老电影",
    "通勤": "坐地铁上班",
    "休闲": "周末逛公园",
    "文艺": "去美术馆",
    "运动": "跑步打球",
}
MOODS = {
    "简约": "不事雕琢",
    "复古": "犹存旧梦",
    "通勤": "进退有度",
    "休闲": "闲看流水",
    "文艺": "满袖书香",
    "运动": "来去如风",
}

MANNERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "catalogue": (
        ("货品：{cut}，{color}。",),
        ("用料：{material}，{quality}。",),
        ("图案：{pattern}。细节：{detail}。",),
        ("风格：{style}。", "风格：{style}。现货。"),
    ),
    "seller": (
        ("姐妹们快看！", "快来看呀！"),
        ("这款{color}的{cut}真的太好看啦！",),
        ("{material}面料{quality}，谁穿谁知道！",),
        ("{pattern}加上{detail}，{style}风拉满！",),
        ("{occasion}穿它准没错，赶快下单吧！", "{occasion}穿它准没错，手慢就没有啦！"),
    ),
    "classical": (
        ("{color}{simile}，", "观其{color}，{simile}，"),
        ("裁{material}以为{cut}，{quality}，宜于四时。",),
        ("饰以{pattern}，制以{detail}，",),
        ("得{style}之趣，{mood}。",),
        ("君若披之，当不负此生。", "君若披之，可共赏春秋。"),
    ),
    "questions": (
        ("这是什么？是一件{color}的{cut}。",),
        ("用什么做的？用{material}，{quality}。", "料子怎么样？是{material}，{quality}。"),
        ("有什么特别？有{pattern}，还有{detail}。",),
        ("适合谁穿？适合喜欢{style}、常常{occasion}的人。",),
    ),
    "list": (
        ("一、{color}{cut}；",),
        ("二、{material}材质，{quality}；",),
        ("三、{pattern}图案，{detail}设计；",),
        ("四、{style}风格，可供{occasion}时穿着。", "四、{style}风格，便于{occasion}时穿着。"),
    ),
    "children": (
        ("小朋友，", "小宝贝，"),
        ("你看你看，{color}的{cut}来啦。",),
        ("摸一摸{material}，哇，{quality}呢。",),
        ("它带着{pattern}，长着{detail}，笑眯眯的。",),
        ("我们穿上{style}的它一起{occasion}，好不好呀？",),
    ),
    "diary": (
        ("今天我穿了新买的{cut}，", "昨天我收到了新买的{cut}，"),
        ("{color}的，心情也跟着好了。",),
        ("{material}果然{quality}，没有让我失望。",),
        ("我最喜欢那{pattern}和{detail}，",),
        ("很有{style}的味道，下次{occasion}还要穿。",),
    ),
}
WANTED_MANNER = "classical"
