import time
from tests import support
from clmoe.data.records import load_train, load_questions
def test_a(tiny_base, mini, tiny_folder):
    t=time.time()
    for task in mini.tasks:
        assert len(load_train(task.train, task.image_root))==24
        assert len(load_questions(task.test, task.image_root))==12
    b=support.prompt_batch(tiny_base, ["How many things are there?", "Which colour is it?\nA."])
    print(tiny_base.model(**b).logits.shape, sum(p.numel() for p in tiny_base.model.parameters()))
    print(support.tiny_config("clmoe", tiny_folder))
    print(support.train_batch(tiny_base,[("How many","one"),("a","b two")])["labels"])
    print(time.time()-t)
