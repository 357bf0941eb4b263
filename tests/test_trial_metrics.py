"""torchmetrics in a module that is searched: they see the accepted states alone."""

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning_runs import batches, loader, trainer  # noqa: E402
from torchmetrics import ClasswiseWrapper, MetricCollection  # noqa: E402
from torchmetrics.classification import (  # noqa: E402
    BinaryAccuracy,
    BinaryAUROC,
    BinaryROC,
    MulticlassAccuracy,
)

import psfast  # noqa: E402
from psfast.lightning import PatternSearchMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def classwise(metric, p, y):
    return metric(p, y)["c_1"]


def false_positives(metric, p, y):
    rates, _, _ = metric(p[:, 1], y)
    return rates.mean()


def one_class(metric, p, y):
    return metric(p, y)[1]


def update_and_compute(metric, p, y):
    metric.update(p[:, 1], y)
    return metric.compute()


def both_thresholds(metric, p, y):
    found = metric(p[:, 1], y)
    return found["even"] - found["sure"]


def since_the_start(metric, p, y):
    metric.update(p[:, 1], y)
    found = metric.compute()
    return found["even"] - found["sure"]


def two_thresholds():
    parts = {"even": BinaryAccuracy(threshold=0.5), "sure": BinaryAccuracy(threshold=0.95)}
    return MetricCollection(parts)


@pytest.mark.parametrize(
    ("make", "measure"),
    [
        (lambda: ClasswiseWrapper(MulticlassAccuracy(2, average=None), prefix="c_"), classwise),
        (lambda: BinaryROC(thresholds=5), false_positives),
        (lambda: MulticlassAccuracy(2, average=None), one_class),
        (BinaryAUROC, update_and_compute),
        (two_thresholds, both_thresholds),
        (two_thresholds, since_the_start),
    ],
)
@pytest.mark.parametrize("with_parts", [False, True])
def test_metrics_of_any_form_see_the_accepted_states_alone(tmp_path, make, measure, with_parts):
    labelled = [(x, (x.sum(-1) > 0).long()) for x, _ in batches()]

    class Classifier(PatternSearchMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 2)
            self.criterion, self.metric = nn.CrossEntropyLoss(), make()

        def search_parts(self, batch):
            return (self.net, self.criterion, *batch) if with_parts else None

        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0])
            self.log("metric", measure(self.metric, outputs.softmax(1), batch[1]))
            return self.criterion(outputs, batch[1])

        def configure_optimizers(self):
            return psfast.PatternSearch(self.parameters(), radius=0.5)

    values, alone = [], make()

    class Compare(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with torch.no_grad():
                expected = measure(alone, module.net(batch[0]).softmax(1), batch[1])
            values.append((trainer.logged_metrics["metric"].item(), expected.item()))

    data = torch.utils.data.DataLoader(labelled, batch_size=None)
    trainer(tmp_path, Compare(), max_epochs=1).fit(Classifier(), data)
    assert len(values) == 3 and all(got == expected for got, expected in values)


def test_a_loss_made_of_a_metric_is_nan_and_one_of_its_function_is_searched(tmp_path):
    from torchmetrics.functional.classification import binary_accuracy

    class Accurate(PatternSearchMixin, L.LightningModule):
        def __init__(self, accuracy):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.accuracy = nn.Linear(3, 1), accuracy

        def training_step(self, batch, batch_idx):
            x, y = batch
            return 1 - self.accuracy(self.net(x).squeeze(1).sigmoid(), (y > 0).long().squeeze(1))

        def configure_optimizers(self):
            return psfast.PatternSearch(self.parameters(), radius=1.0, max_accepts=20)

    fit = trainer(tmp_path, max_epochs=1)
    with pytest.warns(RuntimeWarning, match="the loss was NaN at all"):
        fit.fit(Accurate(BinaryAccuracy()), loader(1))
    module = Accurate(binary_accuracy)
    trainer(tmp_path, max_epochs=10).fit(module, loader(1))
    assert module.last_search.loss_before < 0.2
