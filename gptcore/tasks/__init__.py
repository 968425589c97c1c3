"""The tasks: what a model learns from which data. The trainer uses only the protocol, `Task`."""

from gptcore.tasks.classify import Classify, ClassifyOptions
from gptcore.tasks.instruct import Instruct, InstructOptions
from gptcore.tasks.language_model import LanguageModel, LanguageModelOptions
from gptcore.tasks.masked_lm import MaskedLM, MaskedLMOptions
from gptcore.tasks.prefer import Prefer, PreferOptions
from gptcore.tasks.task import Batch, Task, TaskOptions

TASKS: dict[str, tuple[type[TaskOptions], type[Task]]] = {
    options.name: (options, task)
    for options, task in (
        (LanguageModelOptions, LanguageModel),
        (MaskedLMOptions, MaskedLM),
        (ClassifyOptions, Classify),
        (InstructOptions, Instruct),
        (PreferOptions, Prefer),
    )
}
"""The options and the class of each task, by name."""

TASK_OF_MODEL = {"gpt": LanguageModelOptions.name, "bert": MaskedLMOptions.name}
"""The default task of each model."""

__all__ = [
    "TASKS",
    "TASK_OF_MODEL",
    "Batch",
    "Classify",
    "ClassifyOptions",
    "Instruct",
    "InstructOptions",
    "LanguageModel",
    "LanguageModelOptions",
    "Prefer",
    "PreferOptions",
    "Task",
    "TaskOptions",
]
