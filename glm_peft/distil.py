"""
Distil documents into a prefix: it answers as the base does that has them in front of it, without their tokens.

    python -m glm_peft.distil --model_name_or_path BASE --document handbook.md --num_virtual_tokens 256 --output_dir O

The base asks and answers questions about the documents, and the prefix learns to say what the base says that reads
them. The same command again goes on where it was stopped.
"""

import logging

import transformers

from glm_peft.adapters.assembly import open_base, put_trainable_adapter_on
from glm_peft.adapters.label_loss import replaced_loss
from glm_peft.arguments.distil import parse_distil_arguments
from glm_peft.distillation.comparison import compare_readers, write_comparison
from glm_peft.distillation.conversations import make_conversations
from glm_peft.distillation.documents import read_documents
from glm_peft.distillation.lessons import Lessons
from glm_peft.distillation.reading import plan_reading
from glm_peft.distillation.start import resolve_length, start_as_text
from glm_peft.models.loading import check_base_weights
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.publishing.callback import prepare_push
from glm_peft.publishing.card.build import write_card
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import choose_level, set_up_logging
from glm_peft.reporting.results import format_results
from glm_peft.training.checkpoints import explain_failed_writing
from glm_peft.training.curves import TrainingCurves
from glm_peft.training.parallel.backends import resolve_backend
from glm_peft.training.run import TrainingRun
from glm_peft.training.run_log import log_data, log_run
from glm_peft.training.trainer import PrefixTrainer

logger = logging.getLogger("glm_peft.distil")
