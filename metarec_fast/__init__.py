"""Meta-learning for recommender systems, fused: MAML, FOMAML, Reptile, Meta-SGD and MAML-R on batched operators."""

from metarec_fast import functional, warm_start
from metarec_fast._bootstrap import Comparison
from metarec_fast.atomics import allow_atomics, atomics_allowed
from metarec_fast.baselines import BASELINES
from metarec_fast.checkpoint import load
from metarec_fast.cold_start import ColdStartCurve, cold_start_curve
from metarec_fast.data import Interactions, UserSplit, load_movielens_small, split_users
from metarec_fast.evaluation import evaluate
from metarec_fast.factor_model import FactorModel
from metarec_fast.features import Features
from metarec_fast.head_evaluation import evaluate_heads
from metarec_fast.heads import Head, join_heads
from metarec_fast.history import History, Trial
from metarec_fast.learner import Learner
from metarec_fast.maml import FOMAML, MAML, MetaSGD
from metarec_fast.maml_r import MAMLR
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import DotRecommender
from metarec_fast.module_recommender import ModuleRecommender
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.optim import SparseAdagrad, SparseAdam, SparseSGD
from metarec_fast.quadrants import QuadrantSplit, evaluate_quadrants, split_quadrants
from metarec_fast.report import Report
from metarec_fast.reptile import Reptile
from metarec_fast.results import FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.sampler import TaskSampler
from metarec_fast.serving import AdaptedUser
from metarec_fast.tasks import Entries, TaskBatch

__version__ = "0.1.0"

__all__ = [
    "BASELINES",
    "FOMAML",
    "MAML",
    "MAMLR",
    "AdaptedUser",
    "ColdStartCurve",
    "Comparison",
    "DotRecommender",
    "Entries",
    "FactorModel",
    "FastWeights",
    "Features",
    "Head",
    "History",
    "Interactions",
    "Learner",
    "MLPRecommender",
    "MetaSGD",
    "MetaStep",
    "ModuleRecommender",
    "MultiTaskRecommender",
    "QuadrantSplit",
    "Report",
    "Reptile",
    "SparseAdagrad",
    "SparseAdam",
    "SparseRows",
    "SparseSGD",
    "TaskBatch",
    "TaskSampler",
    "TopK",
    "Trial",
    "UserSplit",
    "allow_atomics",
    "atomics_allowed",
    "cold_start_curve",
    "evaluate",
    "evaluate_heads",
    "evaluate_quadrants",
    "functional",
    "join_heads",
    "load",
    "load_movielens_small",
    "split_quadrants",
    "split_users",
    "warm_start",
]  # fmt: skip
