"""`hasten tokens fit|inspect|map|train|refine|sample`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from hasten.cli.common import BAR, console
from hasten.cli.options import numbers
from hasten.errors import ConfigError, ModelError
from hasten.io import check_target, write_atomically

if TYPE_CHECKING:
    from hasten.bench.token_plots import Decode

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Smaller vocabularies for autoregressive image models (MASC).")

Codebook = Annotated[
    Path, typer.Argument(help="A codebook [codes, width]: .npy, or .safetensors with one matrix.", dir_okay=False)
]
TreeFile = Annotated[Path, typer.Argument(help="A tree that `hasten tokens fit` wrote.")]
MapFile = Annotated[Path, typer.Option("--map", help="A map that `hasten tokens map` wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


def read_codebook(path: Path, name: str | None = None) -> NDArray[Any]:
    """The matrix of a `.npy` or `.safetensors` file.

    Raises:
        ModelError: if there is none, or it is not clear which.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a codebook as .npy or .safetensors")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path))
        from safetensors.torch import load_file

        matrices = {key: value for key, value in load_file(path).items() if value.ndim == 2}
    except Exception as error:  # whatever the two readers raise, the file is no codebook
        raise ModelError(f"{path}: cannot be read as a codebook ({error})") from error
    if name is None and len(matrices) == 1:
        (name,) = matrices
    if name not in matrices:
        raise ModelError(f"{path} holds the matrices {', '.join(sorted(matrices))}; say which with --tensor")
    return matrices[name].float().numpy()


def load_decoder(name: str) -> Decode:
    """The function `module:function` that draws tokens as images `[n, H, W, 3]` in [0, 1].

    For `inspect` it gets tokens `[n]`, each to be drawn alone; for `sample` the tokens `[n, L]` of images.

    Raises:
        ConfigError: if there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--decoder {name}: {error}; give module:function, such as hasten_zoo.emoji_tokens:swatches"
        ) from error
    if not callable(found):
        raise ConfigError(f"--decoder {name} is a {type(found).__name__}, expected a function of tokens")
    return found


@app.command()
def fit(
    codebook: Codebook,
    out: Out = Path("tree.safetensors"),
    tensor: Annotated[str | None, typer.Option(help="Name of the matrix in a safetensors file.")] = None,
    normalize: Annotated[str, typer.Option(help="unit for tokenizers that look up normalized codes; none")] = "none",
    tokens: Annotated[
        Path | None, typer.Option(help="Shards of tokens: codes that never occur are left out of the tree.")
    ] = None,
    exact: Annotated[bool | None, typer.Option(help="Exact by default up to 32,768 codes.")] = None,
) -> None:
    """Fit the semantic tree of a codebook.

    Example: hasten tokens fit codebook.npy --normalize unit --out tree.safetensors
    """
    from hasten.tokens.shards import TokenShards
    from hasten.tokens.tree import SemanticTree

    codes = read_codebook(codebook, tensor)
    used = None if tokens is None else TokenShards.open(tokens).token_counts()
    check_target(out)
    if codes.ndim == 2:
        console.print(
            str(SemanticTree.cost(len(codes) if used is None else int((used > 0).sum()), codes.shape[1], exact))
        )
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("distances", total=None)
        tree = SemanticTree.fit(
            codes,
            normalize=normalize,  # type: ignore[arg-type]
            used=used,
            exact=exact,
            progress=lambda done, total: bar.update(task, completed=done, total=total, description="merging"),
        )
    tree.save(out)
    kind = "exact" if tree.exact else "approximate"
    console.print(f"{len(codes)} codes, {tree.leaves} used, {kind} tree: [bold]{out}[/bold]")


@app.command()
def inspect(
    tree: TreeFile,
    k: Annotated[str, typer.Option(help="Numbers of clusters, with commas.")] = "",
    plots: Annotated[Path | None, typer.Option(help="Folder for images of the tree and the sizes.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="module:function that draws tokens; adds swatches of each cut to --plots.")
    ] = None,
) -> None:
    """Show cuts of a tree: sizes of clusters and the distance at which the cut lies.

    Example: hasten tokens inspect tree.safetensors --k 512 --plots plots --decoder hasten_zoo.emoji_tokens:swatches
    """
    from hasten.bench.token_plots import plot_sizes, plot_swatches, plot_tree
    from hasten.tokens.tree import SemanticTree

    if decoder is not None and plots is None:
        raise ConfigError("--decoder draws swatches into the folder of --plots; give both")
    decode = None if decoder is None else load_decoder(decoder)
    tree_ = SemanticTree.load(tree)
    ks = numbers(k, "--k") if k else [max(1, tree_.leaves // 2**i) for i in range(1, 5)]
    table = Table("k", "largest", "median", "of one code", "height", title=f"{tree.name}: {tree_.leaves} used codes")
    maps = {f"cut {i}": tree_.map(value) for i, value in enumerate(ks)}
    for value, mapping in zip(ks, maps.values(), strict=True):
        merged = tree_.leaves - value
        height = f"{tree_.heights[merged - 1]:.4g}" if merged else "0"
        sizes = mapping.sizes
        table.add_row(str(value), str(sizes.max()), f"{np.median(sizes):g}", str((sizes == 1).sum()), height)
    console.print(table)
    if plots is not None:
        console.print(f"sizes: [bold]{plot_sizes(maps, plots / 'sizes.png')}[/bold]")
        if tree_.exact:
            console.print(f"tree:  [bold]{plot_tree(tree_, plots / 'tree.png')}[/bold]")
        if decode is not None:
            files = [plot_swatches(m, decode, plots / f"swatches-{m.clusters}.png") for m in maps.values()]
            console.print(f"members of the largest clusters: [bold]{', '.join(map(str, files))}[/bold]")


@app.command("map")
def map_(
    tree: TreeFile,
    k: Annotated[int, typer.Option(min=1, help="Clusters.")],
    out: Out = Path("map.safetensors"),
    max_size: Annotated[int | None, typer.Option(min=1, help="Most used codes of a cluster.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="Shards of tokens that are to be mapped.")] = None,
    mapped: Annotated[Path | None, typer.Option(help="Folder for the mapped shards.")] = None,
) -> None:
    """Cut a tree into a map, and map token shards with it.

    Example: hasten tokens map tree.safetensors --k 4096 --max-size 32 --tokens fine --mapped coarse
    """
    from hasten.tokens.shards import TokenShards
    from hasten.tokens.tree import SemanticTree

    if (tokens is None) != (mapped is None):
        raise ConfigError("--tokens and --mapped belong together: the shards to read, and the folder to write")
    mapping = SemanticTree.load(tree).map(k, max_size)
    mapping.save(out)
    console.print(f"{mapping.tokens} tokens to {mapping.clusters} clusters: [bold]{out}[/bold]")
    if tokens is not None and mapped is not None:
        with Progress(*BAR, console=console) as bar:
            task = bar.add_task("mapping", total=None)
            shards = TokenShards.open(tokens).mapped(
                mapping, mapped, lambda done, total: bar.update(task, completed=done, total=total)
            )
        console.print(f"{len(shards)} images of {shards.length} clusters: [bold]{mapped}[/bold]")


@app.command()
def train(
    tokens: Annotated[Path, typer.Argument(help="Shards of fine tokens.")],
    mapping: MapFile,
    out: Out = Path("runs/tokens"),
    held_out: Annotated[Path | None, typer.Option(help="Shards to measure on.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step, over all processes.")] = 64,
    width: Annotated[int, typer.Option(min=1)] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 6,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Seed = 0,
) -> None:
    """Train a class-conditional model on clusters; resumable, and under `accelerate launch` data parallel.

    Example: hasten tokens train fine --map map.safetensors --held-out val --steps 5000 --out runs/masc
    """
    from hasten.fitting.token_model import Recipe, Trainer
    from hasten.tokens.mapping import TokenMap
    from hasten.tokens.replace import export_model
    from hasten.tokens.shards import TokenShards

    recipe = Recipe(steps=steps, batch=batch, width=width, layers=layers, heads=heads, lr=lr, seed=seed)
    trainer = Trainer(TokenShards.open(tokens), TokenMap.load(mapping), recipe)
    other = None if held_out is None else TokenShards.open(held_out)
    main = trainer.accelerator.is_main_process
    with Progress(*BAR, console=console, disable=not main) as bar:
        task = bar.add_task("training", total=steps)
        done = trainer.run(
            out,
            other,
            minutes,
            progress=lambda now, total, loss: bar.update(task, completed=now, description=f"loss {loss:.3f}"),
        )
    if not main:
        return
    if done:
        export_model(trainer.plain, trainer.mapping, out / "model")
        console.print(f"model: [bold]{out / 'model'}[/bold]")
    else:
        console.print(f"stopped at step {trainer.steps} of {steps}; the same command goes on")


@app.command()
def refine(
    tokens: Annotated[Path, typer.Argument(help="Shards of fine tokens.")],
    model: Annotated[Path, typer.Option("--model", help="The folder `model` that `hasten tokens train` wrote.")],
    out: Out = Path("refiner.safetensors"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 64,
    width: Annotated[int, typer.Option(min=1, help="Of the refiner; 512 in the paper.")] = 512,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    layers: Annotated[int, typer.Option(min=1)] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    seed: Seed = 0,
) -> None:
    """Train a refiner, which chooses the member of a cluster by the model's hidden state; the model is only run.

    Example: hasten tokens refine fine --model runs/masc/model --out runs/masc/refiner.safetensors
    """
    import torch

    from hasten.fitting.refiner import train_refiner
    from hasten.tokens.refiner import Refiner, RefinerConfig
    from hasten.tokens.replace import open_model
    from hasten.tokens.shards import TokenShards

    lm, mapping = open_model(model)
    torch.manual_seed(seed)
    config = RefinerConfig(hidden=lm.config.hidden_size, width=width, heads=heads, layers=layers)
    refiner = Refiner(mapping, config)
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("training", total=steps)
        losses = train_refiner(
            lm,
            refiner,
            TokenShards.open(tokens),
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    last = losses[-max(1, steps // 10) :]
    console.print(f"loss {np.mean(last):.3f} nats a token: [bold]{refiner.save(out)}[/bold]")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="The folder `model` that `hasten tokens train` wrote.")],
    classes: Annotated[str, typer.Option(help="One class an image, with commas.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of an image.")],
    out: Out = Path("samples.npy"),
    members: Annotated[str, typer.Option(help="uniform, frequency, medoid or centroid.")] = "uniform",
    refiner: Annotated[
        Path | None, typer.Option(help="A refiner that `hasten tokens refine` wrote; it takes the place of --members.")
    ] = None,
    codebook: Annotated[Path | None, typer.Option(help="For medoid and centroid.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="Shards of fine tokens, for frequency.")] = None,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="In fine tokens; scaled to the clusters. 0 for no limit.")] = 0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 1.0,
    decoder: Annotated[
        str | None, typer.Option(help="module:function that draws images of tokens; writes a .png beside --out.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw fine tokens, [images, length] as .npy, for a tokenizer to decode.

    Example: hasten tokens sample runs/masc/model --classes 0,0,3 --length 64 --decoder hasten_zoo.emoji_tokens:decode
    """
    import torch

    from hasten.bench.token_plots import plot_images
    from hasten.tokens.members import MemberSampler
    from hasten.tokens.refiner import Refiner
    from hasten.tokens.replace import open_model
    from hasten.tokens.sample import Sampling, sample_clusters, scaled_top_k
    from hasten.tokens.shards import TokenShards

    decode = None if decoder is None else load_decoder(decoder)
    lm, mapping = open_model(model)
    limit = scaled_top_k(top_k, mapping.tokens, mapping.clusters)
    sampling = Sampling(temperature=temperature, top_k=limit, top_p=top_p, guidance=guidance)
    counts = None if tokens is None else TokenShards.open(tokens).token_counts()
    codes = None if codebook is None else read_codebook(codebook)
    sampler = MemberSampler.make(mapping, members, codebook=codes, counts=counts)  # type: ignore[arg-type]
    chooser = None
    if refiner is not None:
        chooser = Refiner.load(refiner)
        chooser.check(mapping)
    wanted = torch.tensor(numbers(classes, "--classes", least=0))
    with console.status("drawing"):
        clusters, states = sample_clusters(lm, wanted, mapping.clusters, length, sampling, seed)
        if chooser is None:
            drawn = sampler(clusters.numpy(), seed)
        else:
            drawn = chooser.sample(states, clusters, torch.Generator().manual_seed(seed)).numpy()
    write_atomically(out, lambda file: np.save(file, drawn))
    console.print(f"{len(wanted)} images of {length} tokens: [bold]{out}[/bold]")
    if decode is not None:
        rows = {f"class {c}": decode(drawn[wanted.numpy() == c]) for c in wanted.unique().tolist()}
        console.print(f"images: [bold]{plot_images(rows, out.with_suffix('.png'))}[/bold]")
