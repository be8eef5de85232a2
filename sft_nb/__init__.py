"""Teach a pretrained model to follow instructions: the names of `FACE`, each loaded when it is asked for"""
__version__ = "0.1.0"
from typing import TYPE_CHECKING

from .face import FACE, quiet_start
from .face import load_name as __getattr__

quiet_start()

if TYPE_CHECKING: # what editors and type checkers see; a test compares it with `FACE`
    from .readers import load_records as load_records
    from .split import split_records as split_records
    from .lint import find_leaks as find_leaks
    from .templates import format_input as format_input
    from .shelf import get_template as get_template
    from .loading import load_model as load_model
    from .rows import view_record as view_record
    from .dataset import InstructionDataset as InstructionDataset
    from .audit import wrong_rows as wrong_rows
    from .collate import custom_collate_fn as custom_collate_fn
    from .loaders import make_loaders as make_loaders
    from .model import ModelConfig as ModelConfig
    from .choices import JobConfig as JobConfig, LoraConfig as LoraConfig, Sampling as Sampling
    from .choices import Stops as Stops, TrainConfig as TrainConfig
    from .settings import load_log as load_log
    from .preflight import check_run as check_run
    from .run import train as train
    from .watch import plot_losses as plot_losses
    from .saving import save_model as save_model
    from .lora import add_lora as add_lora, merge_lora as merge_lora
    from .adapters import load_adapter as load_adapter, save_adapter as save_adapter
    from .generation import answer_records as answer_records, generate as generate
    from .responses import load_responses as load_responses, save_responses as save_responses
    from .scores import score_responses as score_responses
    from .comparison import compare_scores as compare_scores
    from .server import Server as Server
    from .judge import judge_file as judge_file
    from .proof import export_model as export_model
    from .job import run_job as run_job
    from .basics import InputError as InputError


def __dir__(): return sorted({*globals(), *FACE})
