"""The serial loop, which every descent must follow."""


def serial_descent(objective, index, delta, margin, most):
    """One trial point at a time: losses of those decided, accepted places, losses after each."""
    losses, places, incumbents = [], [], []
    for k in range(len(index)):
        at = index[k : k + 1], delta[k : k + 1]
        losses.append(objective.losses(*at).item())
        if losses[-1] < objective().item() - margin:
            objective.accept(*at)
            places.append(k)
            incumbents.append(objective().item())
            if len(places) == most:
                break
    return losses, places, incumbents
