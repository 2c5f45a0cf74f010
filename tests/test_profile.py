"""What a profile is read as: the table by kind, and a run's own steps on a CPU."""

from mlra_jax import profile
from mlra_jax.profile import Kernel, by_kind
from tests.training import tiny

TEXT = """
%loop_add_fusion.1 = f32[8] fusion(%a), metadata={op_name="jit(step)/optimizer/add"}
%fusion.2 = f32[8] fusion(%a), metadata={op_name="jit(step)/while/body/dot_general"}
%custom-call.3 = f32[8] custom-call(%a), metadata={op_name="jit(step)/splash_mha_dkv"}
"""


def test_time_is_told_apart_by_what_kernels_do():
    found = [
        Kernel("nvjet_sm90_tst_256x128", 72, 5000),
        Kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", 24, 3000),
        Kernel("causal_attention_backward_mosaic_gpu_kernel", 24, 1000),
        Kernel("void cudnn::fusion::fmha_reduce_head<true>", 48, 500),
        Kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 24, 2000),
        Kernel("ncclDevKernel_ReduceScatter", 1, 1500),
        Kernel("loop_add_fusion_1", 1, 1250),
        Kernel("MemcpyP2P", 2, 250),
        Kernel("fusion_2", 1, 250),
        Kernel("MemcpyD2D", 1, 125),
    ]
    assert by_kind(found, TEXT) == {
        "products": 5.0,
        "attention backward": 4.5,
        "attention forward": 2.0,
        "communication": 1.75,
        "optimizer": 1.25,
        "element-wise": 0.25,
        "copies": 0.125,
    }
    found = [Kernel(name, 1, 1000) for name in ("loop_add_fusion.1", "fusion.2", "custom-call.3")]
    of_tpu = {"optimizer": 1.0, "products": 1.0, "attention backward": 1.0}
    assert by_kind(found, TEXT, "tpu") == of_tpu


def test_the_first_steps_of_a_run_leave_a_profile(tmp_path):
    lines = []
    profile.profile_steps(tiny.experiment(), 2, tmp_path, lines.append)
    assert lines[0].endswith(" ms a step, 96 tokens")
    assert lines[1] == "no table: the profiler names no kernels of a cpu"
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 1000 and lines[-1].endswith(f"opens {trace}")
