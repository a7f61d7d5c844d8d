/*
 * A small product: a few rows times a panel of PANEL outputs, whole in the processor's registers. Included once for
 * each type of number and kind of processor, with
 * TILE: the name; TILE_ROWS: as many rows as have room; VECTOR,
 * FACTOR: what sums and factors are in; ZERO, MULTIPLY_ADD(sum, a, b), SPREAD(word), FETCH and
 * KEEP: what the processor has.
 *
 * Rows and panels are 32-bit words along their inputs: one float, two bfloat16 or four bytes each.
 */
#define TILE_OF JOINED_NAME(TILE, _of)

TARGET INLINE void
TILE_OF(const int32_t *x, long stride, const int32_t *panel, long depth, int32_t *sums, const int rows)
{
	for (int from = 0; from < PANEL; from += VECTORS * LANES)
	{
		VECTOR		each[TILE_ROWS][VECTORS];

#pragma GCC unroll 16
		for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
			for (int v = 0; v < VECTORS; v++)
				each[r][v] = ZERO;
		for (long k = 0; k < depth; k++)
		{
			FACTOR		weights[VECTORS];

			for (int line = 0; line < VECTORS * LANES; line += 16)
				__builtin_prefetch(panel + (k + AHEAD) * PANEL + from + line);

#pragma GCC unroll 8
			for (int v = 0; v < VECTORS; v++)
				weights[v] = FETCH(panel + k * PANEL + from + v * LANES);
#pragma GCC unroll 16
			for (int r = 0; r < rows; r++)
			{
				FACTOR		word = SPREAD(x + r * stride + k);

#pragma GCC unroll 8
				for (int v = 0; v < VECTORS; v++)
					each[r][v] = MULTIPLY_ADD(each[r][v], word, weights[v]);
			}
		}
#pragma GCC unroll 16
		for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
			for (int v = 0; v < VECTORS; v++)
				KEEP(sums + r * PANEL + from + v * LANES, each[r][v]);
	}
}

TARGET static void
TILE(const void *x, long stride, const void *panel, long depth, int rows, void *sums, const char *coming, long pace)
{
	(void) coming;
	(void) pace;
	switch (rows)
	{
#define CASE(number) case number: TILE_OF(x, stride, panel, depth, sums, number); break;
			CASE(1) CASE(2) CASE(3)
#if TILE_ROWS > 3
			CASE(4)
#endif
#if TILE_ROWS > 4
			CASE(5) CASE(6)
#endif
#if TILE_ROWS > 6
			CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
	}
}

#undef TILE_OF
#undef TILE
#undef TILE_ROWS
#undef VECTOR
#undef FACTOR
#undef ZERO
#undef MULTIPLY_ADD
#undef SPREAD
#undef FETCH
#undef KEEP
