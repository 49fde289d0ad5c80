"""What the page says, in English and in Chinese; the browser's language decides."""

import gradio as gr

_WORDS = {
    # tabs
    "compare": ("Compare", "对比"),
    "data": ("Data", "数据"),
    "train": ("Train", "训练"),
    "adapter": ("Adapter", "适配器"),
    # compare
    "question": ("Question", "问题"),
    "question_hint": (
        "Ask all of them; Enter sends, Shift+Enter begins a new line",
        "同时向所有模型提问；回车发送，Shift+回车换行",
    ),
    "ask": ("Ask", "提问"),
    "stop": ("Stop", "停止"),
    "clear": ("New conversation", "新对话"),
    "settings": ("System text and sampling", "系统提示与采样"),
    "system": ("System text", "系统提示"),
    "system_hint": (
        "Comes before all turns; empty: as each was trained",
        "置于整个对话之前；留空则沿用各自训练时的设置",
    ),
    "max_new_tokens": ("Most tokens of an answer", "回答的最大 token 数"),
    "do_sample": ("Draw at random", "随机采样"),
    "do_sample_hint": ("Off: always the most likely token", "关闭时总取概率最高的 token"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top p", "Top p"),
    "top_k": ("Top k (0: no limit)", "Top k（0 为不限）"),
    "seed": ("Seed", "随机种子"),
    "save": ("Save as training rows", "存为训练数据"),
    "conversations": ("Saved conversations", "已存的对话"),
    "saved": ("Saved as a row of {file}.", "已存入 {file}。"),
    "preferences": ("Preferred answers", "偏好数据"),
    "no_answer": (
        "{name} gave no answer, and the question is taken back there.",
        "{name} 没有给出回答，该处的问题已撤回。",
    ),
    "forgotten": (
        "{name}: the oldest {count} messages no longer fit into the prompt.",
        "{name}：最早的 {count} 条消息已放不进提示，不再使用。",
    ),
    "preferred": (
        "Noted in {file}: {count} pair(s) of a better and a worse answer.",
        "已记入 {file}：{count} 对较好与较差的回答。",
    ),
    "nothing_to_prefer": (
        "There is no other answer to compare with: ask two or more, whose answers differ.",
        "没有可比较的其他回答：需要两个以上的回答，且内容不同。",
    ),
    "empty_question": ("Write a question first.", "请先输入问题。"),
    "nothing_to_save": ("There is no conversation yet.", "还没有对话。"),
    # data
    "data_file": ("Data file", "数据文件"),
    "further_flags": ("Further flags", "其他参数"),
    "data_flags_hint": (
        "as for training, such as --prompt_column question --max_source_length 256",
        "与训练相同，例如 --prompt_column question --max_source_length 256",
    ),
    "examine": ("Examine", "检查"),
    "report": ("Report", "检查报告"),
    "report_hint": ("The doctor's report comes here.", "检查报告会显示在这里。"),
    "examining": ("The doctor is looking at the rows …", "正在检查数据……"),
    "lengths": ("Lengths in tokens", "长度分布（token）"),
    "tokens": ("tokens", "token 数"),
    "texts": ("texts", "条数"),
    "prompts": ("prompts", "提示"),
    "answers": ("answers", "回答"),
    "example": ("The first example: what carries loss is marked", "第一个样本：标出的部分计入损失"),
    "carries_loss": ("carries loss", "计入损失"),
    "no_file": ("Choose a file first.", "请先选择文件。"),
    # train
    "recipe": ("Recipe", "配方"),
    "recipe_hint": ("A file of settings; what stands below wins over it", "设置文件；下方填写的内容优先"),
    "no_recipe": ("none", "不使用"),
    "train_file": ("Training data", "训练数据"),
    "output_dir": ("Output folder", "输出文件夹"),
    "num_virtual_tokens": ("Virtual tokens", "虚拟 token 数"),
    "max_steps": ("Steps", "训练步数"),
    "num_train_epochs": ("Epochs (without steps)", "训练轮数（不填步数时）"),
    "learning_rate": ("Learning rate", "学习率"),
    "per_device_train_batch_size": ("Batch size", "批大小"),
    "max_source_length": ("Most tokens of a prompt", "提示的最大 token 数"),
    "max_target_length": ("Most tokens of an answer", "回答的最大 token 数"),
    "train_flags_hint": ("such as --logging_steps 5", "例如 --logging_steps 5"),
    "no_output_dir": ("Name an output folder first.", "请先填写输出文件夹。"),
    "command": ("The command", "将运行的命令"),
    "start": ("Start", "开始训练"),
    "stop_training": ("Stop (keeps a checkpoint)", "停止（保留检查点）"),
    "log": ("The end of the log (train.log in the output folder)", "日志末尾（全文在输出文件夹的 train.log）"),
    "loss": ("Loss", "损失"),
    "step": ("step", "步"),
    "training": ("training", "训练"),
    "evaluation": ("evaluation", "验证"),
    "idle": ("Nothing has been trained here yet.", "这里还没有训练过。"),
    "loading": ("Loading model and data …", "正在加载模型和数据……"),
    "running": ("Step {step} of {steps}", "第 {step} / {steps} 步"),
    "finished": ("Finished: {folder}", "训练完成：{folder}"),
    "stopped": (
        "Stopped; it can go on with --resume_from_checkpoint last.",
        "已停止；加 --resume_from_checkpoint last 可继续。",
    ),
    "failed": ("Ended with an error: {reason}", "出错结束：{reason}"),
    "adapter_name": ("Name", "名称"),
    "add": ("Compare it", "加入对比"),
    "added": ("{name} answers now.", "{name} 已可回答。"),
    "no_place": (
        "No further column is free: start the page again with --adapters.",
        "没有空余的列：请用 --adapters 重新启动页面。",
    ),
    # adapter
    "which": ("Adapter", "适配器"),
    "which_hint": ("One that answers here, or a folder", "已加载的适配器，或一个文件夹"),
    "rows": ("Rows to try it on (optional)", "试验用数据（可选）"),
    "inspect": ("Inspect", "分析"),
    "card": ("Card", "说明卡"),
    "inspection": ("Inspection", "分析结果"),
    "inspecting": ("Measuring …", "正在测量……"),
    "norms": ("Norms of keys and values by layer", "各层键与值的范数"),
    "layer": ("layer", "层"),
    "keys": ("keys", "键"),
    "values": ("values", "值"),
    "no_adapter": ("There is no adapter yet: train one.", "还没有适配器：先训练一个。"),
}

_ENGLISH, _CHINESE = ({key: words[number] for key, words in _WORDS.items()} for number in (0, 1))
TEXT = gr.I18n(**{"en": _ENGLISH, "zh-CN": _CHINESE, "zh-TW": _CHINESE})
"""The words of labels and buttons, which the browser chooses."""


def is_chinese(request: gr.Request | None) -> bool:
    """Return whether the browser asks for Chinese before all other languages."""
    return request is not None and request.headers.get("accept-language", "").startswith(("zh-CN", "zh-TW"))


def say(request: gr.Request | None, key: str, **values: object) -> str:
    """Return a sentence in the browser's language, with the values in their places."""
    return (_CHINESE if is_chinese(request) else _ENGLISH)[key].format(**values)
