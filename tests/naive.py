"The yardstick of generation for models that the chapter's plain decoder does not cover: nothing is kept, nothing is shared."
import torch


@torch.no_grad()
def naive_answer(model, prompt, max_new, stop_ids=()):
    "The best next id, again and again, with the whole row computed anew each time"
    ids, device = list(prompt), model.embed.weight.device
    while len(ids)<len(prompt)+max_new and (len(ids)==len(prompt) or ids[-1] not in stop_ids):
        ids.append(int(model(torch.tensor([ids], device=device))[0,-1].argmax()))
    return ids[len(prompt):]
