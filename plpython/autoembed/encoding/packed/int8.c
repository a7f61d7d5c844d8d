/*
 * What lies between the int8 matrix products of an encoder: each pass over a matrix that torch would make for one
 * operation is made once for all of them.
 *
 * A row x of floats is held as bytes q, one scale and one middle: x = q * scale + middle, with q from -127 to 127.
 * A product of such a row with a weight's column w = p * column_scale is then
 *     sum(q * p) * scale * column_scale + middle * column_sum,    where column_sum = sum(p) * column_scale,
 * and sum(q * p) is exact in 32 bits: a row's result depends on that row alone, whatever else is in the matrix.
 * A few inputs of each product are far larger than all others and would make every step as coarse as themselves:
 * these outliers stay floats, their weights have no bytes, and their part of the product is added as it is.
 *
 * Called through ctypes by autoembed.quantized, which checks shapes. All matrices are contiguous.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

#define STEPS 127.0f
#define OUTLIERS 8
#define LARGEST_ROW 16384		/* floats on the stack of each thread */

struct product					/* of quantized rows and a quantized weight */
{
	const int32_t *sums;		/* rows x columns: sum(q * p) */
	const float *scales;		/* a row */
	const float *middles;		/* a row */
	const float *outliers;		/* rows x OUTLIERS */
	const float *column_scales;
	const float *column_sums;
	const float *bias;
	const float *outlier_weights;	/* OUTLIERS x columns */
};

struct quantized				/* rows for the next product */
{
	int8_t	   *steps;
	float	   *scales;
	float	   *middles;
	float	   *outliers;
	const int64_t *places;		/* of the outliers in a row */
};

/* values lose their outliers */
FOR_EACH_CPU static void
quantize_row(float *restrict values, long row, long columns, const struct quantized *out)
{
	int8_t	   *restrict steps = out->steps + row * columns;
	float	   *outliers = out->outliers + row * OUTLIERS;
	float		least = 0;
	float		most = 0;
	float		middle;
	float		poison = 0;
	float		half;
	float		inverse;

	for (int o = 0; o < OUTLIERS; o++)
	{
		outliers[o] = values[out->places[o]];
		values[out->places[o]] = 0;
	}

	/* What is not finite has no byte: it makes the scale NaN, and so all that comes of this row. */
#pragma omp simd reduction(min:least) reduction(max:most) reduction(+:poison)
	for (long c = 0; c < columns; c++)
	{
		poison += values[c] * 0.0f;
		least = values[c] < least ? values[c] : least;
		most = values[c] > most ? values[c] : most;
	}
	half = (most - least) * 0.5f;
	middle = least + half;
	out->middles[row] = middle;
	out->scales[row] = half / STEPS + poison;
	inverse = half > 0 ? STEPS / half : 0;
#pragma omp simd
	for (long c = 0; c < columns; c++)
		steps[c] = (int8_t) (int32_t) rintf((values[c] - middle) * inverse);
}

FOR_EACH_CPU static void
dequantize_row(const struct product *p, long row, long columns, float *restrict out)
{
	const int32_t *restrict sums = p->sums + row * columns;
	const float *restrict column_scales = p->column_scales;
	const float *restrict column_sums = p->column_sums;
	const float *restrict bias = p->bias;
	const float *restrict weights = p->outlier_weights;
	const float *outliers = p->outliers + row * OUTLIERS;
	float		scale = p->scales[row];
	float		middle = p->middles[row];

#pragma omp simd
	for (long c = 0; c < columns; c++)
	{
		float		value = (float) sums[c] * scale * column_scales[c] + (middle * column_sums[c] + bias[c]);

		for (int o = 0; o < OUTLIERS; o++)
			value += outliers[o] * weights[o * columns + c];
		out[c] = value;
	}
}

/* x * P(X <= x), X normal; the error function by Abramowitz and Stegun 7.1.26, to 1.5e-7 */
FOR_EACH_CPU static void
gelu_row(float *restrict values, long columns)
{
#pragma omp simd
	for (long c = 0; c < columns; c++)
	{
		float		x = values[c];
		float		z = fabsf(x) * 0.707106781f;
		float		t = 1.0f / (1.0f + 0.3275911f * z);
		float		tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) * exp_negative(-z * z);

		values[c] = x * (x > 0 ? 1.0f - 0.5f * tail : 0.5f * tail);
	}
}

FOR_EACH_CPU static void
norm_row(float *restrict values, const float *restrict residual, const float *restrict weight, const float *restrict bias, float epsilon, long columns)
{
	float		sum = 0;
	float		squares = 0;
	float		mean;
	float		inverse;

#pragma omp simd reduction(+:sum)
	for (long c = 0; c < columns; c++)
	{
		values[c] += residual[c];
		sum += values[c];
	}
	mean = sum / columns;
#pragma omp simd reduction(+:squares)
	for (long c = 0; c < columns; c++)
		squares += (values[c] - mean) * (values[c] - mean);
	inverse = 1.0f / sqrtf(squares / columns + epsilon);
#pragma omp simd
	for (long c = 0; c < columns; c++)
		values[c] = (values[c] - mean) * inverse * weight[c] + bias[c];
}

/* -1 for rows that the stack does not take, here and below */
int
autoembed_quantize(const float *values, long rows, long columns, const struct quantized *out, int threads)
{
	if (columns > LARGEST_ROW)
		return -1;
#pragma omp parallel num_threads(threads)
	{
		float		buffer[LARGEST_ROW];

#pragma omp for schedule(static)
		for (long row = 0; row < rows; row++)
		{
			memcpy(buffer, values + row * columns, columns * sizeof(float));
			quantize_row(buffer, row, columns, out);
		}
	}
	return 0;
}

/* out may be the product's sums */
int
autoembed_dequantize(const struct product *p, long rows, long columns, void *out, int threads)
{
	if (columns > LARGEST_ROW)
		return -1;
#pragma omp parallel num_threads(threads)
	{
		float		buffer[LARGEST_ROW];

#pragma omp for schedule(static)
		for (long row = 0; row < rows; row++)
		{
			dequantize_row(p, row, columns, buffer);
			memcpy((char *) out + row * columns * sizeof(float), buffer, columns * sizeof(float));
		}
	}
	return 0;
}

/* gelu of a product, quantized */
int
autoembed_gelu(const struct product *p, long rows, long columns, const struct quantized *out, int threads)
{
	if (columns > LARGEST_ROW)
		return -1;
#pragma omp parallel num_threads(threads)
	{
		float		buffer[LARGEST_ROW];

#pragma omp for schedule(static)
		for (long row = 0; row < rows; row++)
		{
			dequantize_row(p, row, columns, buffer);
			gelu_row(buffer, columns);
			quantize_row(buffer, row, columns, out);
		}
	}
	return 0;
}

/* layer norm of a product and what it is added to, in place of the latter, and the same quantized */
int
autoembed_add_norm(const struct product *p, long rows, long columns, const float *weight, const float *bias, float epsilon, float *tokens, const struct quantized *out, int threads)
{
	if (columns > LARGEST_ROW)
		return -1;
#pragma omp parallel num_threads(threads)
	{
		float		buffer[LARGEST_ROW];

#pragma omp for schedule(static)
		for (long row = 0; row < rows; row++)
		{
			float	   *kept = tokens + row * columns;

			dequantize_row(p, row, columns, buffer);
			norm_row(buffer, kept, weight, bias, epsilon, columns);
			memcpy(kept, buffer, columns * sizeof(float));
			quantize_row(buffer, row, columns, out);
		}
	}
	return 0;
}
