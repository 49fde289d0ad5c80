"""The requests by which a model that reads a text is led to ask about it, in Chinese and English."""

# After the self-study of "Cartridges" (arXiv 2506.06266): questions of one kind alone leave out what the others ask.
SEED_PROMPTS = {
    "zh": {
        "facts": (
            "请根据上面的资料，提出一个关于具体事实的问题，例如名称、数字、日期或规定。只写出问题。",
            "请从上面的资料里选一个细节，就它提一个问题。只写出问题。",
        ),
        "structure": (
            "请提出一个关于上面资料的结构的问题，例如有哪些部分、按什么顺序。只写出问题。",
            "请提出一个问题，问上面的资料里哪些内容属于同一类。只写出问题。",
        ),
        "summary": (
            "请提出一个请求，要求概括上面资料的一个部分。只写出请求。",
            "请提出一个请求，要求用一两句话说明上面资料的主要内容。只写出请求。",
        ),
        "use": (
            "请设想一位要用到上面资料的人，写出这个人会提的一个问题。只写出问题。",
            "请写出一个实际的情形和一个问题，回答它要用到上面的资料。只写出情形和问题。",
        ),
        "reasoning": (
            "请提出一个要把上面资料里的几处内容放在一起推理才能回答的问题。只写出问题。",
            "请提出一个要比较上面资料里两项内容才能回答的问题。只写出问题。",
        ),
    },
    "en": {
        "facts": (
            "Ask one question about a specific fact in the text above, such as a name, a number, a date or a rule. "
            "Write the question only.",
            "Choose a detail of the text above and ask one question about it. Write the question only.",
        ),
        "structure": (
            "Ask one question about how the text above is organized, such as which parts it has and in what order. "
            "Write the question only.",
            "Ask one question about which things in the text above belong together. Write the question only.",
        ),
        "summary": (
            "Write one request for a summary of a part of the text above. Write the request only.",
            "Write one request to say in a sentence or two what the text above is about. Write the request only.",
        ),
        "use": (
            "Imagine someone who needs the text above, and write one question that this person would ask. "
            "Write the question only.",
            "Describe a situation in which the text above is needed, and ask one question about it. "
            "Write the situation and the question only.",
        ),
        "reasoning": (
            "Ask one question that can be answered only by putting several places of the text above together. "
            "Write the question only.",
            "Ask one question that can be answered only by comparing two things in the text above. "
            "Write the question only.",
        ),
    },
}
"""By language and kind."""


def language_of(text: str) -> str:
    """Return the language to ask in: "zh" where a tenth of the letters or more are Chinese characters, else "en"."""
    letters = [character for character in text if character.isalpha()]
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    return "zh" if letters and chinese >= len(letters) / 10 else "en"
