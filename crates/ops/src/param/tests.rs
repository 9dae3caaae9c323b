use super::*;

#[test]
fn counting_allocates_nothing_and_names_are_paths() {
    let builder = Builder::shapes_only();
    let huge = builder
        .at("layers")
        .at(0)
        .param("weight", &[1 << 20, 1 << 20], Init::Zeros);
    assert_eq!(huge.name(), "layers.0.weight");
    assert_eq!(builder.store().count(), 1 << 40);
}

#[test]
fn parameters_to_be_set_are_zero_until_then() {
    let builder = Builder::unfilled(&Device::flex());
    let weight = builder.param("weight", &[2, 3], Init::Ones);
    assert_eq!(weight.values(), [0.0; 6]);
    assert_eq!(tensor_values(weight.tensor::<2>()), [0.0; 6]);
    weight.set(vec![2.0; 6]).expect("as many");
    assert_eq!(tensor_values(weight.tensor::<2>()), [2.0; 6]);
}

#[test]
fn initial_values_depend_on_seed_and_name_only() {
    let device = Device::flex().autodiff();
    let make = |seed, first: &str, second: &str| {
        let builder = Builder::new(&device, seed);
        builder.param(first, &[4], Init::Normal(1.0));
        builder.param(second, &[4], Init::Normal(1.0));
        let store = builder.store();
        store.get("a").map(Param::values)
    };
    assert_eq!(make(1, "a", "b"), make(1, "b", "a"));
    assert_ne!(make(1, "a", "b"), make(2, "a", "b"));
}

#[test]
fn values_update_and_gradients_follow() {
    let device = Device::flex().autodiff();
    let builder = Builder::new(&device, 0);
    let weight = builder.param("weight", &[2, 3], Init::Ones);
    weight.update(|values| values[5] = 3.0);
    let loss = weight.tensor::<2>().powi_scalar(2).sum();
    let mut gradients = loss.backward();
    let grad = weight.gradient(&mut gradients).expect("in the loss");
    assert_eq!(grad, [2.0, 2.0, 2.0, 2.0, 2.0, 6.0]);
    assert!(weight.set(vec![0.0; 5]).is_err());
    builder.store().set_tracking(false);
    assert!(!weight.tensor::<2>().device().is_autodiff());
}
