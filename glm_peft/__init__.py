"""P-Tuning v2 for every ChatGLM generation, on PEFT and without remote code.

Importing this package teaches transformers' Auto classes to read the published ChatGLM folders.
"""

from glm_peft import models as models

__version__ = "0.1.0"
