"""P-Tuning v2 for every ChatGLM generation, on PEFT and without remote code.

Importing this package teaches transformers' Auto classes to read the published ChatGLM folders.
"""

from glm_peft.arguments.command_help import show_help_if_asked

show_help_if_asked()  # before the models, whose import takes seconds

from glm_peft import models as models  # noqa: E402

__version__ = "0.1.0"
