"""The data sheets, as found: see ``docs/simulated-devices.md`` for the same table to read.

A new accelerator is one more entry with a source for each figure. A figure that nobody
publishes is left out or named under ``assumptions``; none is guessed silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from midspan_simulated.data_sheet import DataSheet, Source

GB = 10**9
GIB = 2**30
TERA = 1e12

_BOTH_WAYS = "the published link bandwidth counts both directions; half of it is one"

_SHEETS = (
    DataSheet(
        name="v100",
        product="NVIDIA V100 SXM2 32 GB",
        kind="data center GPU, 2017",
        memory_bytes=32 * GB,
        bandwidth=900e9,
        peaks={"float16": 125 * TERA, "float32": 15.7 * TERA},
        link_bandwidth=150e9,
        sources=(
            Source(
                title="NVIDIA V100 Tensor Core GPU data sheet",
                url="https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
                read="as open-source tables of accelerators quote it",
            ),
            Source(
                title="Programming Tensor Cores in CUDA 9 (125 TFLOPS)",
                url="https://developer.nvidia.com/programming-tensor-cores-cuda-9-0",
            ),
        ),
        assumptions=(_BOTH_WAYS + " (300 GB/s)",),
    ),
    DataSheet(
        name="a100",
        product="NVIDIA A100 SXM4 80 GB",
        kind="data center GPU, 2020",
        memory_bytes=80 * GB,
        bandwidth=2039e9,
        peaks={"bfloat16": 312 * TERA, "float16": 312 * TERA, "float32": 19.5 * TERA},
        link_bandwidth=300e9,
        sources=(
            Source(
                title="NVIDIA A100 Tensor Core GPU data sheet (1758950 r4)",
                url="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
                read="as quoted by https://glennklockwood.com/garden/processors/A100",
            ),
        ),
        assumptions=(_BOTH_WAYS + " (600 GB/s)",),
    ),
    DataSheet(
        name="h100",
        product="NVIDIA H100 SXM5 80 GB",
        kind="data center GPU, 2022",
        memory_bytes=80 * GB,
        bandwidth=3.35e12,
        peaks={"bfloat16": 989.5 * TERA, "float16": 989.5 * TERA, "float32": 67 * TERA},
        link_bandwidth=450e9,
        sources=(
            Source(
                title="NVIDIA H100 Tensor Core GPU, product page and data sheet",
                url="https://www.nvidia.com/en-us/data-center/h100/",
                read="as quoted by https://glennklockwood.com/garden/processors/h100",
            ),
        ),
        assumptions=(
            "16-bit peaks are published with sparsity (1,979 TFLOPS); half of it is dense, as the sheet's note says",
            _BOTH_WAYS + " (900 GB/s)",
        ),
    ),
    DataSheet(
        name="mi300x",
        product="AMD Instinct MI300X",
        kind="data center GPU, 2023",
        memory_bytes=192 * GB,
        bandwidth=5.3e12,
        peaks={"bfloat16": 1307.4 * TERA, "float16": 1307.4 * TERA, "float32": 163.4 * TERA},
        link_bandwidth=448e9,
        sources=(
            Source(
                title="AMD Instinct MI300X accelerator data sheet",
                url="https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
                read="as AMD's own footnotes and open-source tables of accelerators quote it",
            ),
        ),
        assumptions=(_BOTH_WAYS + " (seven links, 896 GB/s)",),
    ),
    DataSheet(
        name="gaudi3",
        product="Intel Gaudi 3 (OAM)",
        kind="training and inference ASIC, 2024",
        memory_bytes=128 * GB,
        bandwidth=3.67e12,
        peaks={"bfloat16": 1835 * TERA},
        link_bandwidth=600e9,
        compiled_whole=True,
        sources=(
            Source(
                title="Intel Gaudi 3 AI Accelerator: Architected for Gen AI Training and Inference (August 2024)",
                url="https://www.sgpjbg.com/baogao/465025.html",
                read="in a copy of Intel's slides",
            ),
        ),
        assumptions=(
            "other types' matrix peaks are not in the source, so only bfloat16 is offered",
            _BOTH_WAYS + " (1,200 GB/s)",
        ),
    ),
    DataSheet(
        name="inferentia2",
        product="AWS Inferentia2",
        kind="inference ASIC, 2023",
        memory_bytes=32 * GIB,
        bandwidth=820.0 * GIB,
        peaks={"bfloat16": 190 * TERA, "float16": 190 * TERA, "float32": 47.5 * TERA},
        link_bandwidth=96.0 * GIB,
        compiled_whole=True,
        sources=(
            Source(
                title="AWS Neuron documentation, Inferentia2 Architecture",
                url="https://awsdocs-neuron.readthedocs-hosted.com/en/latest/general/arch/neuron-hardware/inferentia2.html",
            ),
            Source(
                title="AWS Neuron documentation, Inf2 Architecture (192 GiB/s a device)",
                url="https://awsdocs-neuron.readthedocs-hosted.com/en/latest/general/arch/neuron-hardware/inf2-arch.html",
            ),
        ),
        assumptions=("the source does not say whether 192 GiB/s counts both directions; half of it is taken for one",),
    ),
    DataSheet(
        name="tpu-v5e",
        product="Google Cloud TPU v5e",
        kind="training and inference ASIC, 2023",
        memory_bytes=16 * GB,
        bandwidth=819e9,
        peaks={"bfloat16": 197 * TERA},
        link_bandwidth=200e9,
        compiled_whole=True,
        sources=(Source(title="Google Cloud documentation, TPU v5e", url="https://cloud.google.com/tpu/docs/v5e"),),
        assumptions=(
            "a float32 peak is not published, so only bfloat16 is offered",
            "1,600 Gbps of interconnect are taken as one direction's (a later edition says 400 GB/s both ways)",
        ),
    ),
    DataSheet(
        name="rtx4090",
        product="NVIDIA GeForce RTX 4090",
        kind="consumer GPU, 2022",
        memory_bytes=24 * GB,
        bandwidth=1008e9,
        peaks={"bfloat16": 165.2 * TERA, "float16": 165.2 * TERA, "float32": 82.6 * TERA},
        link_bandwidth=32e9,
        sources=(
            Source(
                title="NVIDIA Ada GPU Architecture, white paper 2.02, appendix A (with FP32 accumulation)",
                url="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
                read="as open-source tables of accelerators quote it",
            ),
        ),
        assumptions=("no link of its own: PCI Express 4.0 x16, 64 GB/s both ways, half of it in one direction",),
    ),
    DataSheet(
        name="epyc-9654",
        product="AMD EPYC 9654, one socket",
        kind="CPU server, 2022",
        memory_bytes=768 * GB,
        bandwidth=460.8e9,
        peaks={"bfloat16": 14.7456 * TERA, "float32": 7.3728 * TERA},
        link_bandwidth=None,
        sources=(
            Source(
                title="AMD EPYC 9004 series: 96 cores at 2.4 GHz, 12 channels of DDR5-4800, 256-bit data path",
                url="https://www.hpctech.co.jp/product/amd-epyc-9004-series/",
                read="in a distributor's table of the series",
            ),
        ),
        assumptions=(
            "memory is what is plugged in: one module of 64 GB in each of 12 channels",
            "peaks are not published: 96 cores x 2.4 GHz (base clock) x 2 units x 8 float32 x 2 operations, "
            "and twice that for bfloat16 dot products",
            "bandwidth is 12 channels x 8 bytes x 4800 million transfers per second",
        ),
    ),
)

DATA_SHEETS: Mapping[str, DataSheet] = {sheet.name: sheet for sheet in _SHEETS}
"""Every sheet by name."""
