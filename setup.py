"""Installation of mmptq.

The plain install names nothing of OpenMMLab, because stock OpenMMLab and its maintained
forks share import names but not distribution names: it must be possible to install
mmptq beside either. The extras name the stock distributions.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split("'")[1]
    for line in (HERE / 'mmptq' / 'version.py').read_text().splitlines()
    if line.startswith('__version__')
)

setup(
    name='mmptq',
    version=VERSION,
    description=(
        'Post-training quantization of Swin and ViT backbones in OpenMMLab detectors'
        ' and segmentors'
    ),
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmptq', 'mmptq.*']),
    package_data={
        'mmptq': [
            'py.typed',
            '.mim/model-index.yml',
            '.mim/configs/**/*.py',
            '.mim/configs/**/*.yml',
        ]
    },
    install_requires=[
        'torch>=2.0',
        'numpy',
        'filelock',
        'pydantic>=2',
        'rich',
        'safetensors',
    ],
    extras_require={
        'det': ['mmengine>=0.10', 'mmcv>=2.0,<2.2', 'mmdet>=3.3,<4'],
        'seg': [
            'mmengine>=0.10',
            'mmcv>=2.0,<2.2',
            'mmsegmentation>=1.2,<2',
            'ftfy',
            'regex',
        ],
        'timm': ['timm>=1.0'],
        'onnx': ['onnx', 'onnxruntime', 'onnxscript'],
        'test': [
            'pytest',
            'hypothesis',
            'ruff',
            'mypy',
            'onnx',
            'onnxruntime',
            'onnxscript',
        ],
        'fuzz': ['atheris'],
    },
    entry_points={'console_scripts': ['mmptq = mmptq.cli:main']},
)
