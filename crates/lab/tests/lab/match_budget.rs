use anyformer_lab::match_budget::{BudgetError, Knob, solve, solve_measured, solve_pair};
use std::cell::Cell;

const WIDTH: Knob = Knob {
    name: "width",
    lo: 16,
    hi: 512,
    multiple: 16,
};

fn params(width: usize) -> f64 {
    (12 * width * width + 13 * width) as f64
}

#[test]
fn finds_the_closest() {
    let found = solve(&WIDTH, params(208) * 1.01, 0.02, params).unwrap();
    assert_eq!(found.size, 208);
    assert!((found.mismatch + 0.01 / 1.01).abs() < 1e-12);
    assert_eq!(solve(&WIDTH, params(16), 0.0, params).unwrap().size, 16);
    assert_eq!(solve(&WIDTH, params(512), 0.0, params).unwrap().size, 512);
}

#[test]
fn cost_that_is_not_monotone() {
    let cost = |n: usize| {
        if n == 480 {
            1000.0
        } else {
            5000.0 + (n as f64 * 0.3).sin() * 900.0
        }
    };
    assert_eq!(solve(&WIDTH, 1001.0, 0.01, cost).unwrap().size, 480);
    let holes = |n: usize| {
        if n.is_multiple_of(32) {
            f64::NAN
        } else {
            n as f64
        }
    };
    assert_eq!(solve(&WIDTH, 65.0, 0.3, holes).unwrap().size, 80);
}

#[test]
fn out_of_tolerance_says_best_and_hint() {
    let knob = Knob {
        name: "width",
        lo: 64,
        hi: 128,
        multiple: 64,
    };
    let text = solve(&knob, 1_000_000.0, 0.02, params)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("1,000,000")
            && text.contains("width=128")
            && text.contains("raise the largest"),
        "{text}"
    );
    let text = solve(&knob, 10.0, 0.02, params).unwrap_err().to_string();
    assert!(
        text.contains("width=64") && text.contains("lower the smallest width below 64"),
        "{text}"
    );
    let text = solve(&WIDTH, params(40), 0.02, params)
        .unwrap_err()
        .to_string();
    assert!(text.contains("multiple below 16"), "{text}");
    let hole = Knob {
        name: "width",
        lo: 17,
        hi: 31,
        multiple: 16,
    };
    assert!(matches!(
        solve(&hole, 10.0, 0.02, params),
        Err(BudgetError::NoSize { .. })
    ));
    for (target, tolerance) in [
        (0.0, 0.1),
        (f64::NAN, 0.1),
        (1.0, -0.1),
        (f64::INFINITY, 0.1),
    ] {
        assert!(matches!(
            solve(&WIDTH, target, tolerance, params),
            Err(BudgetError::BadTarget { .. })
        ));
    }
}

#[test]
fn measured_agrees_with_exhaustive_and_is_cheap() {
    let knob = Knob {
        name: "width",
        lo: 1,
        hi: 4000,
        multiple: 1,
    };
    for target in [30.0, 1234.5, 5e6, params(4000)] {
        let calls = Cell::new(0);
        let counted = |n| {
            calls.set(calls.get() + 1);
            params(n)
        };
        let fast = solve_measured(&knob, target, 1.0, counted).unwrap();
        assert_eq!(fast, solve(&knob, target, 1.0, params).unwrap());
        assert!(calls.get() <= 15, "{} evaluations", calls.get());
    }
    let text = solve_measured(&knob, 1e9, 0.02, params)
        .unwrap_err()
        .to_string();
    assert!(text.contains("width=4000"), "{text}");
}

#[test]
fn pair_keeps_proportions_and_meets_a_tight_tolerance() {
    let coarse = Knob {
        name: "width",
        lo: 32,
        hi: 512,
        multiple: 32,
    };
    let fine = |width: usize| Knob {
        name: "hidden",
        lo: width,
        hi: 8 * width,
        multiple: 1,
    };
    let cost = |width: usize, hidden: usize| (4 * width * width + 2 * width * hidden) as f64 * 2.0;
    for target in [200_000.0, 500_000.0, 3_000_000.0] {
        let found = solve_pair(&coarse, |width| 4 * width, fine, target, 0.002, cost).unwrap();
        assert!(found.mismatch.abs() <= 0.002);
        assert_eq!(found.cost, cost(found.coarse, found.fine));
        let ratio = found.fine as f64 / found.coarse as f64;
        assert!((2.0..6.5).contains(&ratio), "hidden/width {ratio}");
    }
    let narrow = |width: usize| Knob {
        name: "hidden",
        lo: 4 * width,
        hi: 4 * width,
        multiple: 1,
    };
    let text = solve_pair(&coarse, |width| 4 * width, narrow, 300_000.0, 0.001, cost)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("hidden=") && text.contains("widen the range of the hidden"),
        "{text}"
    );
}
