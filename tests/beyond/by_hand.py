"""Small models, and what the package computes with them, computed another way."""

import torch
from diffusers import DDIMScheduler

from nemolib.layers import cross_attention_layers
from nemolib.pipeline import embed
from nemolib.seeding import latents as draw
from tests.random_pipeline import random_pipeline
from tests.random_world import amplify


def small_pipeline(prediction="epsilon", *, side=16, seed=0):
    """Return a random pipeline in which text matters, for noise or velocity and latents of a side."""
    pipe = amplify(random_pipeline(seed=seed))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    pipe.register_modules(scheduler=DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction))
    pipe.unet.register_to_config(sample_size=side)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(pipe, samples=2, seed=1):
    side = pipe.unet.config.sample_size
    return draw((4, side, side), samples=samples, seed=seed)


def schedule(pipe, steps):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler


def made(pipe, prompts=("a b", "c"), **options):
    """Return the latents that the pipeline makes of prompts."""
    options = {"latents": start(pipe, len(prompts)), "num_inference_steps": 2, "guidance_scale": 3.0} | options
    return pipe(**({"prompt": list(prompts)} | options), output_type="latent").images


def noise(pipe, x, timestep, embedding):
    """Return eps; from a velocity by way of the image that the scheduler makes of it."""
    with torch.no_grad():
        output = pipe.unet(x, timestep, embedding.expand(len(x), -1, -1)).sample
    if pipe.scheduler.config.prediction_type == "epsilon":
        return output
    scheduler = schedule(pipe, 50)
    image = scheduler.step(output, timestep, x).pred_original_sample
    kept = scheduler.alphas_cumprod[timestep]
    return (x - kept.sqrt() * image) / (1 - kept).sqrt()


def difference(pipe, x, timestep, prompt):
    return noise(pipe, x, timestep, embed(pipe, [prompt])) - noise(pipe, x, timestep, embed(pipe, [""]))


def step_back(scheduler, x, eps, timestep, steps):
    """Return x of the next step, by the formula of DDIM."""
    before = timestep - 1000 // steps
    kept = scheduler.alphas_cumprod[timestep]
    earlier = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    image = (x - (1 - kept).sqrt() * eps) / kept.sqrt()
    return earlier.sqrt() * image + (1 - earlier).sqrt() * eps


def follow(index, timestep, x, empty, text):
    """Return plain guidance."""
    return empty + 3.0 * (text - empty)


def sampled(pipe, x, prompt, steps, rule):
    """Yield timestep, x, eps without and with a prompt; `rule(index, timestep, x, empty, text)` gives what is followed."""
    scheduler = schedule(pipe, steps)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        empty, text = (noise(pipe, x, timestep, embed(pipe, [each])) for each in ("", prompt))
        yield timestep, x, empty, text
        x = step_back(scheduler, x, rule(index, timestep, x, empty, text), timestep, steps)
    yield None, x, None, None


def attention(pipe, x, timestep, prompt):
    """Return layer -> probabilities [sample, head, position, token], by diffusers' own function."""
    found, handles = {}, []
    for layer in cross_attention_layers(pipe.unet, "value"):
        module = pipe.unet.get_submodule(layer.name.removesuffix(".to_v"))

        def keep(module, args, kwargs, name=layer.name):
            query = module.head_to_batch_dim(module.to_q(args[0]))
            key = module.head_to_batch_dim(module.to_k(kwargs["encoder_hidden_states"]))
            found[name] = module.get_attention_scores(query, key).unflatten(0, (len(x), -1))

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    noise(pipe, x, timestep, embed(pipe, [prompt]))
    for handle in handles:
        handle.remove()
    return found


def traces(pipe):
    """Return what a method could leave behind."""
    modules = pipe.unet.named_modules()
    hooks = [name for name, part in modules if part._forward_hooks or part._forward_pre_hooks]
    kinds = {type(item) for item in pipe.unet.attn_processors.values()}
    gradients = [each.grad for each in pipe.unet.parameters() if each.grad is not None or each.requires_grad]
    return hooks, kinds, gradients, "prepare_latents" in vars(pipe)
