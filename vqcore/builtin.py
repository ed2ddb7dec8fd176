"""The manifest of the core: the core is a plugin too. Light layer."""

from vqcore.plugin import API, Component, Plugin, hookimpl

# fmt: off
COMPONENTS = (  # kind, name, target in vqcore, summary
    ("modality", "rgb", "modalities.rgb:RGB", "photographs and other RGB pictures"),
    ("modality", "array", "modalities.array:Array", "any array of 1 to 3 axes: channels, range and kind are declared"),
    ("modality", "mask", "modalities.mask:Mask", "an extra modality: which positions of the sample are valid"),
    ("modality", "caption", "modalities.beside:Caption", "an extra modality: a text for each sample"),
    ("modality", "target", "modalities.beside:Target", "an extra modality: the same sample at another size"),
    ("reader", "npy", "data.readers:Npy", ".npy files"),
    ("reader", "npz", "data.readers:Npz", ".npz files: an array by name"),
    ("reader", "tiff", "data.readers:Tiff", "TIFF and GeoTIFF, all pages; no-data values become a mask"),
    ("reader", "csv", "data.readers:Csv", ".csv files: columns are channels, rows are positions"),
    ("reader", "parquet", "data.readers:Parquet", "Parquet files: columns are channels, rows are positions"),
    ("reader", "hdf5", "data.readers:Hdf5", "HDF5 files: a data set by its path"),
    ("data", "folder", "data.sources:Folder", "a folder of files, at any depth"),
    ("data", "tar", "data.sources:Tar", "tar shards with the names of WebDataset, on disk or at addresses"),
    ("data", "parquet", "data.parquet:Parquet", "columns of Parquet files: files as bytes, or lists of numbers"),
    ("data", "array", "data.sources:ArrayFile", "samples stacked in one .npy or .npz file"),
    ("data", "tokens", "tokens.source:Tokens", "samples with the codes that were made of them: trains a decoder alone"),
    ("store", "arrow", "tokens.arrow:Arrow", "Arrow files, mapped into memory: random access by place and by key"),
    ("store", "parquet", "tokens.parquet:Parquet", "Parquet files: a column of keys and one of lists; for other tools"),
    ("store", "tar", "tokens.tar:Tar", "tar shards with the names of WebDataset: KEY.npy, and KEY.json for extras"),
    ("store", "folder", "tokens.folder:Folder", "one .npy or .npz of codes a file, under the same names"),
    ("objective", "reconstruction", "objectives:Reconstruction", "pixel loss plus the losses of the quantizer"),
    ("objective", "diffusion", "objectives:Diffusion", "a denoiser learns to undo noise: diffusion and flow"),
    ("metric", "psnr", "metrics.pixels:PSNR", "peak signal-to-noise ratio in dB, mean over samples"),
    ("metric", "ssim", "metrics.ssim:SSIM", "structural similarity of 8-bit pictures, mean over samples"),
    ("metric", "mae", "metrics.pixels:MAE", "mean absolute error in the values that the tokenizer gets"),
    ("metric", "channels", "metrics.pixels:Channels", "RMSE, mean absolute error and bias of each channel, in units"),
    ("metric", "accuracy", "metrics.labels:Accuracy", "share of positions with the right class"),
    ("metric", "iou", "metrics.labels:IoU", "intersection over union, mean over the classes that occur"),
    ("metric", "f1", "metrics.labels:F1", "F1 of the positions above a threshold: edges, masks"),
    ("metric", "angle", "metrics.vectors:Angle", "degrees between directions: mean, median, shares"),
    ("metric", "cosine", "metrics.vectors:Cosine", "mean cosine between vectors over channels"),
)
# fmt: on


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names have no slash."""
    return Plugin(
        api=API,
        summary="Protocols, trainer, data, tokens and command line",
        components=tuple(
            Component(kind, name, f"vqcore.{target}", summary) for kind, name, target, summary in COMPONENTS
        ),
    )
