use super::*;
use crate::attention::cache::Element;

/// Keys and values in pages of tables, added in portions.
fn paged(case: &Case, element: Element) -> [Vec<Table>; 2] {
    let [_, kv_heads, head_dim, value_dim] = case.dims;
    let table = |values: &[f32], dim: usize, ends: &[usize]| {
        let width = kv_heads * dim;
        let rows = &values[ends[0] * width..ends[1] * width];
        let portions = rows.chunks(37 * width);
        portions.fold(Table::new(element, kv_heads, dim), |table, rows| {
            table.with_rows(rows)
        })
    };
    let tables = |values: &[f32], dim: usize| {
        let ends = case.k_offsets.windows(2);
        ends.map(|ends| table(values, dim, ends)).collect()
    };
    [tables(&case.k, head_dim), tables(&case.v, value_dim)]
}

#[test]
pub(super) fn pages_give_the_bits_of_flat_rows() {
    let causal = |window| mask(true, window);
    for (q, k, dims, mask) in [
        // Decoding, a mix of contexts; chunked reading; a window; more rows than a decoded token has; nothing.
        (
            vec![0, 1, 2, 3],
            vec![0, 700, 701, 1900],
            [4, 2, 16, 24],
            causal(None),
        ),
        (
            vec![0, 70, 71],
            vec![0, 200, 290],
            [2, 2, 8, 8],
            causal(None),
        ),
        (
            vec![0, 1, 40],
            vec![0, 300, 500],
            [2, 1, 8, 8],
            causal(Some(90)),
        ),
        (
            vec![0, 1, 2],
            vec![0, 130, 195],
            [16, 1, 32, 32],
            causal(None),
        ),
        (vec![0, 0, 2], vec![0, 3, 5], [1, 1, 4, 4], Mask::default()),
    ] {
        let case = Case::new(&q, &k, dims, mask, q.len() == 3);
        let want = forward(&case.fast());
        let (o, _) = case.naive().forward();
        assert_close("o", &want.o, &narrow(&o), 1e-5);
        let [k, v] = paged(&case, Element::F32);
        let got = forward(&Attention {
            k: Rows::Paged(&k),
            v: Rows::Paged(&v),
            ..case.fast()
        });
        assert_eq!(got.o, want.o, "{dims:?}");
        assert_eq!(got.lse, want.lse, "{dims:?}");
        let [k, v] = paged(&case, Element::Bf16);
        let got = forward(&Attention {
            k: Rows::Paged(&k),
            v: Rows::Paged(&v),
            ..case.fast()
        });
        let mut rounded = case.clone();
        for value in rounded.k.iter_mut().chain(&mut rounded.v) {
            *value = crate::bf16::to_f32(crate::bf16::round(*value));
        }
        assert_eq!(got.o, forward(&rounded.fast()).o, "{dims:?} in bf16");
    }
}
