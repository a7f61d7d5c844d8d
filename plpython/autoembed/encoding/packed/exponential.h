/* e^x for finite x <= 0, to 2e-7, and NaN of anything else: 2^n by the exponent's bits, the rest by a polynomial (Cephes) */
static inline float
exp_negative(float x)
{
	float		scaled = x > -87.0f ? x * 1.44269504f : -87.0f * 1.44269504f;
	float		whole = rintf(scaled);
	float		r = (scaled - whole) * 0.693147181f;
	union
	{
		int32_t		bits;
		float		value;
	}			power;

	power.bits = ((int32_t) whole + 127) << 23;
	/* a NaN compares with nothing, and would be gone by now */
	return x * 0.0f + power.value * (1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f))))));
}
