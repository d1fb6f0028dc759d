"""DeepSeek-V4 in vLLM on kvfold: `python examples/vllm_plugin.py MODEL [window|fold]` on GPUs; without arguments on a CPU.

With a model it starts vLLM with kvfold switched on and completes a sentence. Without, it shows what vLLM builds then, and what
a request's state costs it: with vLLM if that is installed, else with what `make engines` has unpacked.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ENGINES = Path(__file__).parents[1] / "build" / "engines"


def generate(model: str, state: str) -> None:
    # Read by kvfold's entry point in each process that vLLM starts, so set before any is.
    os.environ |= {"KVFOLD_ENGINES": f"vllm:{state}"}
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, trust_remote_code=True)
    for done in engine.generate(["The KV cache of a long text"], SamplingParams(max_tokens=64, temperature=0)):
        print(done.prompt + done.outputs[0].text)


def describe() -> None:
    if ENGINES.is_dir():
        sys.path += [str(ENGINES / "vllm"), str(ENGINES / "packages")]
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif find_spec("vllm") is None:
        sys.exit("vLLM is not here: `pip install vllm==0.33.0`, or `make engines` in a clone of kvfold")
    import torch
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.models.deepseek_v4 import attention, compressor

    from kvfold.integrations import switch
    from kvfold.integrations.vllm import register, unregister

    for state in ("", "window", "fold"):
        unregister()
        if state:
            register(state)
        print(f"\nkvfold: {switch.ON.get('vllm', 'off')}")
        print(f"the compressor of V4 is {attention.DeepseekCompressor.__module__}.{attention.DeepseekCompressor.__name__}")
        config = VllmConfig(device_config=DeviceConfig(device="cpu"))
        config.cache_config.cache_dtype = "fp8_ds_mla"
        config.speculative_config = SimpleNamespace(num_speculative_tokens=3, parallel_drafting=False)
        with set_current_vllm_config(config):
            for ratio, channels in ((128, 512), (4, 1024)):
                # One layer's state, as a model asks vLLM for it.
                layer = compressor.CompressorStateCache(2 * channels, torch.float32, ratio, f"layer.{ratio}.state")
                spec = layer.get_kv_cache_spec(config)
                whole = getattr(spec, "sliding_window", 0)  # rows that it keeps behind a request's last token, if it slides
                blocks = whole // spec.block_size + 1 if whole else 1
                print(f"ratio {ratio}: {blocks} blocks of {spec.page_size_bytes:,} bytes for each request and layer")
    unregister()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        generate(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "window")
    else:
        describe()
