"""mSAM: multi-task SAM (arXiv 2403.10971, section 3.1)."""

from transformers import AutoConfig, AutoModel

from .configuration import MSamConfig
from .modeling import MSamForMultiTask, MSamOutput
from .processing import MSamProcessor
from .tasks import TaskSpec

__all__ = ["MSamConfig", "MSamForMultiTask", "MSamOutput", "MSamProcessor", "TaskSpec"]

AutoConfig.register(MSamConfig.model_type, MSamConfig, exist_ok=True)
AutoModel.register(MSamConfig, MSamForMultiTask, exist_ok=True)
