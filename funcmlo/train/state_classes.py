"""The classes of optimizer and estimator states that the library knows by itself.

A file can hold them where the first state holds nothing yet, as in an estimator's state.
"""

from __future__ import annotations

from torchopt.base import EmptyState, UninitializedState
from torchopt.transform.add_decayed_weights import MaskedNode, MaskedState
from torchopt.transform.scale_by_adadelta import ScaleByAdadeltaState
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.scale_by_adamax import ScaleByAdamaxState
from torchopt.transform.scale_by_radam import ScaleByRAdamState
from torchopt.transform.scale_by_rms import ScaleByRmsState
from torchopt.transform.scale_by_rss import ScaleByRssState
from torchopt.transform.scale_by_schedule import ScaleByScheduleState
from torchopt.transform.scale_by_stddev import ScaleByRStdDevState
from torchopt.transform.trace import TraceState as TorchoptTraceState

from funcmlo.hypergrad.warm import Drift
from funcmlo.optim.rates import ScheduleState
from funcmlo.optim.scale_by_adadelta import AdadeltaState
from funcmlo.optim.scale_by_adam import Moments
from funcmlo.optim.scale_by_rms import RmsState
from funcmlo.optim.scale_by_rss import RssState
from funcmlo.optim.trace import TraceState
from funcmlo.optim.transformation import Empty
from funcmlo.train.encoding import class_name

_OWN = (Drift, ScheduleState, AdadeltaState, Moments, RmsState, RssState, TraceState, Empty)
_TORCHOPT = (
    EmptyState,
    UninitializedState,
    MaskedNode,
    MaskedState,
    ScaleByAdadeltaState,
    ScaleByAdamState,
    ScaleByAdamaxState,
    ScaleByRAdamState,
    ScaleByRmsState,
    ScaleByRssState,
    ScaleByScheduleState,
    ScaleByRStdDevState,
    TorchoptTraceState,
)
LIBRARY: dict[str, type] = {class_name(cls): cls for cls in (*_OWN, *_TORCHOPT)}
