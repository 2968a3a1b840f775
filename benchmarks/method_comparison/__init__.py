"""The methods in PEFT's own comparison: Llama-3.2-3B trained on MetaMathQA, tested on GSM8K, with forgetting on Wikipedia.

PEFT's repository has it in `method_comparison/MetaMathQA`. Nothing of it is copied: the user checks PEFT out, and data, training
loop, evaluation and result file are those of the checkout. It needs Python 3.12 and about 24 GB of GPU memory.

    git clone https://github.com/huggingface/peft CHECKOUT
    pip install -r CHECKOUT/method_comparison/MetaMathQA/requirements.txt
    python -m benchmarks.method_comparison write --out OUT
    python -m benchmarks.method_comparison run --peft CHECKOUT OUT/experiments/contrast/llama-3.2-3B-rank32-lr_0.0001
    python -m benchmarks.method_comparison show OUT --peft CHECKOUT

`experiments`: the folders. `checkout`: their modules, and the one function that is replaced. `start`: calibration and the start of
the adapters. `filtering`: a trained LoRA, filtered and evaluated by their functions. `results`: their result files. `dry_run`: the
same code on a CPU, in three steps, with local data.
"""
