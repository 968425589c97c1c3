"""The tasks: what is learnt from which data. The trainer knows them as `Task` alone."""

from gptcore.tasks.language_model import LanguageModel, LanguageModelOptions
from gptcore.tasks.masked_lm import MaskedLM, MaskedLMOptions
from gptcore.tasks.task import Batch, Task, TaskOptions

TASKS: dict[str, tuple[type[TaskOptions], type[Task]]] = {
    options.name: (options, task)
    for options, task in ((LanguageModelOptions, LanguageModel), (MaskedLMOptions, MaskedLM))
}
"""By name, a task's options and the task."""

TASK_OF_MODEL = {"gpt": LanguageModelOptions.name, "bert": MaskedLMOptions.name}
"""The task that each model is trained on unless another is named."""

__all__ = ["TASKS", "TASK_OF_MODEL", "Batch", "LanguageModel", "LanguageModelOptions", "Task", "TaskOptions"]
