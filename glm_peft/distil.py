"""
Distil documents into a prefix: it answers as the base does that has them in front of it, without their tokens.

    python -m glm_peft.distil --model_name_or_path BASE --document handbook.md --num_virtual_tokens 256 --output_dir O

The base asks and answers questions about the documents, and the prefix learns to say what the base says that reads
them. The same command again goes on where it was stopped.
"""

import logging

import transformers

from glm_peft.adapters.assembly import open_base, put_trainable_adapter_on
from glm_peft.adapters.divergence_loss import divergence_from
from glm_peft.adapters.label_loss import replaced_loss
from glm_peft.arguments.distil import parse_distil_arguments
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.distillation.comparison import compare_held_out
from glm_peft.distillation.conversations import make_conversations, read_questions
from glm_peft.distillation.documents import read_documents
from glm_peft.distillation.lessons import Lessons, encode_lessons, hear_teacher, learning_from_conversations
from glm_peft.distillation.reading import Readers, plan_reading
from glm_peft.distillation.report import write_comparison
from glm_peft.distillation.start import is_exact, resolve_length, start_as_text
from glm_peft.models.loading import check_base_weights
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
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


@exit_with_user_errors()
def main() -> None:
    """Make conversations about the documents, learn them, and compare what the prefix says with what reading gives."""
    # Arguments and documents, decided before any weight is loaded
    distil_args, arguments = parse_distil_arguments()
    set_up_logging(choose_level(arguments.training), is_main_process=arguments.training.process_index == 0)
    transformers.set_seed(arguments.training.seed)
    document = read_documents(distil_args.document)
    base = open_base(arguments.model, arguments.data, is_trainable=True)
    reading = plan_reading(base, document.text, distil_args)
    base = resolve_length(base, reading)
    arguments = arguments.resolve(base.model_args, base.data_args)
    questions, arguments = read_questions(reading, arguments.data, distil_args), learning_from_conversations(arguments)
    model_args, data_args, training_args = arguments
    check_base_weights(model_args)
    pusher = prepare_push(model_args, training_args)
    run = TrainingRun(arguments)
    loading_device = resolve_backend(model_args, training_args)

    # Models: the base that reads, and the same base with a prefix that starts as the text
    model = base.load_model(loading_device, runs_on=training_args.device)
    student = put_trainable_adapter_on(model, base, training_args)
    start_as_text(student, base, reading, distil_args)
    run.check_weights(student)
    readers = Readers(base, model)

    # Conversations about the documents, and what reading them gives each token of the answers
    rows = make_conversations(reading, readers, distil_args, training_args, data_args, questions)
    lessons = Lessons(rows, reading.texts, distil_args.num_held_out, run.output_dir)
    splits, data = lessons.as_splits(), encode_lessons(lessons, base, data_args)
    run.take_rows(splits)
    values = hear_teacher(lessons, data, readers, distil_args, training_args)

    # Trainer
    collator = TrainingCollator(base.tokenizer)
    batching = plan_batching(data.examples["train"], collator, base.config, arguments)
    log_data(data, base.tokenizer, batching)
    log_run(student, arguments, data.reports, batching)
    scoring = Scoring.from_arguments(Answering(student, base.tokenizer, base.chat_format), training_args, data_args)
    trainer = PrefixTrainer(
        student,
        training_args,
        data_collator=collator,
        batching=batching,
        eval_dataset=evaluation_sets(data.examples),
        record=run.begin_record(scoring, splits, documents=document.describe(base.tokenizer)),
    )
    trainer.add_callback(TrainingCurves(run.output_dir, scoring.protocol))
    trainer.add_callback(pusher)

    # Train, evaluate, compare with reading and with neither
    results: dict[str, float] = {}
    with explain_failed_writing("The result", run.output_dir):
        with replaced_loss(model, divergence_from(values)):
            if is_exact(base, reading):
                run.save(scoring)
            else:
                results |= run.train(trainer, scoring)
            results |= trainer.evaluate()
        write_comparison(run.output_dir, compare_held_out(lessons, readers, student, scoring))
        run.save_results(results)

        # Adapter out
        run.write_record(trainer, results)
        write_card(run.output_dir)
    logger.info("%s\nresults: %s", format_results(results), run.output_dir)
    pusher.finish()  # last: where the adapter cannot be sent, the last line is the command that sends it


if __name__ == "__main__":
    main()
