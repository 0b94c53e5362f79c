"""The Triton kernels of `grouped`, which describes the table and the buffers that they read.

With the cosine s of a pair and k = log2(e) / temperature, e = 2^(k s - k) is its similarity on a
scale on which no sum overflows: for unit vectors e <= 1.

R rows of the block that a program owns, Q columns of a tile that it visits; WIDTH is the embedding
width with its padding, of which PIECE elements are multiplied at a time, and the gradient has OUT.
With SPLIT, rows and weights stand in two parts of fp16, the second being what rounding took of the
first.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are written in Triton's language, whose types Python's checkers do not know.
from __future__ import annotations

from .triton_tools import INTERPRETED, jit, tl

# ---- reading the table


@jit
def _integer(pointer):
    return tl.load(pointer).to(tl.int32)


@jit
def _number(pointer):
    """The fp32 number whose bits an entry holds."""
    return tl.load(pointer).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _halves(pointer):
    """The pointer to rows of fp16 that an entry holds."""
    return tl.multiple_of(tl.load(pointer).to(tl.pointer_type(tl.float16)), 16)


@jit
def _set(table, index):
    """Of a set: pointers to both parts of its rows, and the last row of each."""
    entry = table + index * 10
    return _halves(entry), _halves(entry + 1), _integer(entry + 2), _integer(entry + 3)


@jit
def _tiles(work, visit):
    """First and last tile of a visit that fall to a program."""
    first = _integer(visit + 1)
    begin = tl.maximum(_integer(work + 4) - first, 0)
    return begin, tl.minimum(_integer(work + 5) - first, _integer(visit + 2))


# ---- similarities and labels


@jit
def _reciprocal(x):
    """1 / x to the last bit or two, in one instruction: that of a division costs registers."""
    if INTERPRETED:
        return 1.0 / x
    assembly: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(assembly, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _rows(pointer, last, start, first, R: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """(R, PIECE) elements from `first` on, of rows from `start` on; behind the last, the last."""
    start = tl.minimum(start, last)
    rows = tl.minimum(tl.arange(0, R), last - start)
    # 64 bits for the one product that can pass 2^31.
    block = pointer + tl.cast(start, tl.int64) * WIDTH + first
    return tl.load(block + rows[:, None] * WIDTH + tl.arange(0, PIECE)[None, :])


@jit
def _both_parts(
    rows,
    start,
    first,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    high_pointer, low_pointer, last_high, last_low = rows
    high = _rows(high_pointer, last_high, start, first, R, WIDTH, PIECE)
    low = high
    if SPLIT:
        low = _rows(low_pointer, last_low, start, first, R, WIDTH, PIECE)
    return high, low


@jit
def _products(x_high, x_low, y_high, y_low, products, SPLIT: tl.constexpr):
    """Adds the (R, Q) scalar products of rows to others."""
    if SPLIT:
        products = tl.dot(x_low, tl.trans(y_high), products)
        products = tl.dot(x_high, tl.trans(y_low), products)
    return tl.dot(x_high, tl.trans(y_high), products)


@jit
def _cosines(
    rows,
    row_start,
    columns,
    start,
    R: tl.constexpr,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(R, Q) cosines, piece by piece of the width."""
    products = tl.zeros((R, Q), tl.float32)
    for first in range(0, WIDTH, PIECE):
        x_high, x_low = _both_parts(rows, row_start, first, R, WIDTH, PIECE, SPLIT)
        y_high, y_low = _both_parts(columns, start, first, Q, WIDTH, PIECE, SPLIT)
        products = _products(x_high, x_low, y_high, y_low, products, SPLIT)
    return products


@jit
def _label_range(ranges, start, R: tl.constexpr):
    """Lowest and highest label of R rows; those that are none have -1."""
    place = ranges + start // 32 * 2
    low, high = tl.load(place), tl.load(place + 1)
    for grain in tl.static_range(1, R // 32):
        low = tl.minimum(low, tl.load(place + 2 * grain))
        high = tl.maximum(high, tl.load(place + 2 * grain + 1))
    return low, high


# ---- kernels


@jit
def pack(table, work_at, labels, ranges, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Copies 32 rows to fp16, with zeros for rows that are none, and their labels."""
    work = table + work_at + tl.program_id(0) * 2
    entry = table + tl.load(work) * 10
    start = _integer(work + 1)
    rows = start + tl.arange(0, 32)
    label_pointer = tl.load(entry + 5).to(tl.pointer_type(tl.int64))
    found = tl.load(label_pointer + rows, mask=rows < _integer(entry + 6), other=-1)
    found = tl.maximum(found, -1).to(tl.int32)
    place = _integer(entry + 4) + start
    tl.store(labels + place + tl.arange(0, 32), found)
    tl.store(ranges + place // 32 * 2, tl.min(found, axis=0))
    tl.store(ranges + place // 32 * 2 + 1, tl.max(found, axis=0))
    kind = tl.load(entry + 9)
    if kind > 0:
        width = _integer(entry + 7)
        elements = tl.arange(0, WIDTH)[None, :]
        source = tl.cast(rows, tl.int64)[:, None] * width + elements
        inside = (found >= 0)[:, None] & (elements < width)
        pointer = tl.load(entry + 8)
        if kind == 1:
            values = tl.load(pointer.to(tl.pointer_type(tl.float32)) + source, mask=inside, other=0)
        else:
            halves = pointer.to(tl.pointer_type(tl.float16))
            values = tl.load(halves + source, mask=inside, other=0).to(tl.float32)
        high = values.to(tl.float16)
        target = tl.cast(rows, tl.int64)[:, None] * WIDTH + elements
        tl.store(_halves(entry) + target, high)
        if SPLIT:
            tl.store(_halves(entry + 1) + target, (values - high.to(tl.float32)).to(tl.float16))


@jit
def negatives(
    table,
    work_at,
    visits_at,
    terms_at,
    labels,
    ranges,
    sums,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Writes the sums of e over the negatives of each row."""
    work = table + work_at + tl.program_id(0) * 8
    row_set, row_start = tl.load(work), _integer(work + 1)
    rows = _set(table, row_set)
    row_place = _integer(table + row_set * 10 + 4) + row_start
    row_labels = tl.load(labels + row_place + tl.arange(0, R))
    row_low, row_high = _label_range(ranges, row_place, R)
    k = _number(table + terms_at + tl.load(work + 7) * 8)
    if PIECE == WIDTH:
        x_high, x_low = _both_parts(rows, row_start, 0, R, WIDTH, WIDTH, SPLIT)
    total = tl.zeros((R,), tl.float32)
    for number in range(_integer(work + 2), _integer(work + 3)):
        visit = table + visits_at + number * 8
        column_set = tl.load(visit)
        columns = _set(table, column_set)
        column_place = _integer(table + column_set * 10 + 4)
        begin, end = _tiles(work, visit)
        for tile in range(begin, end):
            start = tile * Q
            if PIECE == WIDTH:
                y_high, y_low = _both_parts(columns, start, 0, Q, WIDTH, WIDTH, SPLIT)
                cosines = tl.zeros((R, Q), tl.float32)
                cosines = _products(x_high, x_low, y_high, y_low, cosines, SPLIT)
            else:
                cosines = _cosines(rows, row_start, columns, start, R, Q, WIDTH, PIECE, SPLIT)
            e = tl.exp2(cosines * k - k)
            low, high = _label_range(ranges, column_place + start, Q)
            if (low < 0) | ((row_low <= high) & (low <= row_high)):
                found = tl.load(labels + column_place + start + tl.arange(0, Q))[None, :]
                e = tl.where((row_labels[:, None] != found) & (found >= 0), e, 0.0)
            total += tl.sum(e, axis=1)
    tl.store(sums + tl.load(work + 6) + tl.arange(0, R), total)


@jit
def positives(
    table,
    work_at,
    visits_at,
    terms_at,
    labels,
    ranges,
    sums,
    found_sums,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Writes sums over the positives of each row: log(1 + n/e), its slope n/(e + n), and 1."""
    work = table + work_at + tl.program_id(0) * 8
    row_set, row_start = tl.load(work), _integer(work + 1)
    rows = _set(table, row_set)
    row_place = _integer(table + row_set * 10 + 4) + row_start
    row_labels = tl.load(labels + row_place + tl.arange(0, R))
    row_low, row_high = _label_range(ranges, row_place, R)
    term = table + terms_at + tl.load(work + 7) * 8
    k = _number(term)
    stride = _integer(term + 2)
    n = tl.zeros((R,), tl.float32)
    share = sums + tl.load(term + 3) + row_start + tl.arange(0, R)
    for _ in range(_integer(term + 4)):
        n += tl.load(share)
        share += stride
    n = tl.log2(n)
    if PIECE == WIDTH:
        x_high, x_low = _both_parts(rows, row_start, 0, R, WIDTH, WIDTH, SPLIT)
    loss = tl.zeros((R,), tl.float32)
    slope = tl.zeros((R,), tl.float32)
    number = tl.zeros((R,), tl.float32)
    for visit_number in range(_integer(work + 2), _integer(work + 3)):
        visit = table + visits_at + visit_number * 8
        column_set, excluded = tl.load(visit), tl.load(visit + 4) // 4
        columns = _set(table, column_set)
        column_place = _integer(table + column_set * 10 + 4)
        begin, end = _tiles(work, visit)
        for tile in range(begin, end):
            start = tile * Q
            low, high = _label_range(ranges, column_place + start, Q)
            if (high >= 0) & (row_low <= high) & (low <= row_high):
                if PIECE == WIDTH:
                    y_high, y_low = _both_parts(columns, start, 0, Q, WIDTH, WIDTH, SPLIT)
                    cosines = tl.zeros((R, Q), tl.float32)
                    cosines = _products(x_high, x_low, y_high, y_low, cosines, SPLIT)
                else:
                    cosines = _cosines(rows, row_start, columns, start, R, Q, WIDTH, PIECE, SPLIT)
                found = tl.load(labels + column_place + start + tl.arange(0, Q))[None, :]
                positive = (row_labels[:, None] == found) & (found >= 0)
                if excluded > 0:
                    own = (row_start + tl.arange(0, R))[:, None] - start == tl.arange(0, Q)[None, :]
                    positive = positive & ~own
                gap = n[:, None] - (cosines * k - k)
                x = tl.exp2(-tl.abs(gap))
                # One division for 1 / (1 + x) and for x / (2 + x), whose inverse hyperbolic tangent
                # is half of log(1 + x): exact for small x too, in seven terms up to x = 1.
                inverse = _reciprocal((1.0 + x) * (2.0 + x))
                w = x * (1.0 + x) * inverse
                u = w * w
                series = 1.0 / 9 + u * (1.0 / 11 + u * (1.0 / 13))
                series = 1.0 + u * (1.0 / 3 + u * (0.2 + u * (1.0 / 7 + u * series)))
                one = tl.maximum(gap, 0.0) * 0.6931471805599453 + 2.0 * w * series
                loss += tl.sum(tl.where(positive, one, 0.0), axis=1)
                sigmoid = tl.where(gap >= 0, 1.0, x) * (2.0 + x) * inverse
                slope += tl.sum(tl.where(positive, sigmoid, 0.0), axis=1)
                number += tl.sum(tl.where(positive, 1.0, 0.0), axis=1)
    target = found_sums + tl.load(work + 6) + tl.arange(0, R)
    tl.store(target, loss)
    tl.store(target + stride, slope)
    tl.store(target + 2 * stride, number)


@jit
def coefficients(table, terms_at, sums, found_sums, weights, steepest, results, plane, num_terms):
    """Adds up the shares of each row of a term, and its rows.

    Writes n, A = sum of slopes / (number n) and 1 / number of each row, behind 128 zeros for rows
    that are no anchors; and for each term the sum of the losses, the anchors with a positive, and
    the largest n A.
    """
    number = tl.program_id(0)
    term = table + terms_at + number * 8
    num_rows, stride = _integer(term + 1), _integer(term + 2)
    shares, found_shares = _integer(term + 4), _integer(term + 6)
    pieces = tl.arange(0, 8)[:, None]
    if number == 0:
        for part in tl.static_range(3):
            tl.store(weights + part * plane + tl.arange(0, 128), tl.zeros((128,), tl.float32))
    total = tl.zeros((256,), tl.float32)
    valid = tl.zeros((256,), tl.float32)
    steep = tl.zeros((256,), tl.float32)
    for start in range(0, stride, 256):
        rows = start + tl.arange(0, 256)
        inside = rows < num_rows
        n = tl.zeros((256,), tl.float32)
        for first in range(0, shares, 8):
            place = sums + tl.load(term + 3) + (first + pieces) * stride + rows[None, :]
            n += tl.sum(
                tl.load(place, mask=(first + pieces < shares) & inside[None, :], other=0), 0
            )
        loss = tl.zeros((256,), tl.float32)
        slope = tl.zeros((256,), tl.float32)
        count = tl.zeros((256,), tl.float32)
        for first in range(0, found_shares, 8):
            there = (first + pieces < found_shares) & inside[None, :]
            place = found_sums + tl.load(term + 5) + 3 * (first + pieces) * stride + rows[None, :]
            loss += tl.sum(tl.load(place, mask=there, other=0), 0)
            slope += tl.sum(tl.load(place + stride, mask=there, other=0), 0)
            count += tl.sum(tl.load(place + 2 * stride, mask=there, other=0), 0)
        weight = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
        push = tl.where(n > 0, slope * weight / tl.where(n > 0, n, 1.0), 0.0)
        target = weights + tl.load(term + 7) + rows
        tl.store(target, n, mask=rows < stride)
        tl.store(target + plane, push, mask=rows < stride)
        tl.store(target + 2 * plane, weight, mask=rows < stride)
        total += loss * weight
        valid += tl.where(count > 0, 1.0, 0.0)
        steep = tl.maximum(steep, slope * weight)
    tl.store(results + number, tl.sum(total, axis=0))
    tl.store(results + num_terms + number, tl.sum(valid, axis=0))
    tl.store(steepest + number, tl.max(steep, axis=0))


@jit
def gradient(
    table,
    work_at,
    visits_at,
    terms_at,
    upstream,
    labels,
    ranges,
    weights,
    steepest,
    gradients,
    plane,
    num_terms,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    OUT: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Writes the gradients of rows, of all terms in which they are anchors or contrasted with.

    d total / d s is e (A_i + A_j) for a negative pair, with the A of those of its two that are
    anchors, and minus the sum of their n / (number (e + n)) for a positive pair.
    """
    work = table + work_at + tl.program_id(0) * 8
    row_set, row_start = tl.load(work), _integer(work + 1)
    rows = _set(table, row_set)
    row_place = _integer(table + row_set * 10 + 4) + row_start
    row_labels = tl.load(labels + row_place + tl.arange(0, R))
    row_low, row_high = _label_range(ranges, row_place, R)
    out = tl.program_id(1) * OUT
    # What is rounded to fp16 is brought to the same size first, whatever the upstream gradients: no
    # |d| is more than twice the n A of an anchor.
    biggest = tl.zeros((64,), tl.float32)
    for first in range(0, num_terms, 64):
        terms = first + tl.arange(0, 64)
        there = terms < num_terms
        bits = tl.load(table + terms_at + terms * 8, mask=there, other=0).to(tl.int32)
        slopes = tl.load(upstream + terms, mask=there, other=0) * bits.to(tl.float32, bitcast=True)
        slopes *= tl.load(steepest + terms, mask=there, other=0)
        biggest = tl.maximum(biggest, tl.abs(slopes))
    biggest = tl.max(biggest, axis=0)
    biggest = tl.where(biggest == 0, 1.0, biggest)
    if PIECE == WIDTH:
        x_high, x_low = _both_parts(rows, row_start, 0, R, WIDTH, WIDTH, SPLIT)
    total = tl.zeros((R, OUT), tl.float32)
    for number in range(_integer(work + 2), _integer(work + 3)):
        visit = table + visits_at + number * 8
        column_set, term, flags = tl.load(visit), tl.load(visit + 3), _integer(visit + 4)
        columns = _set(table, column_set)
        column_place = _integer(table + column_set * 10 + 4)
        k = _number(table + terms_at + term * 8)
        # Twice this number is far from both ends of fp16.
        factor = tl.load(upstream + term) * k / biggest * 4096.0
        push = factor * (flags % 2)
        pull = factor * (flags // 2 % 2)
        excluded = flags // 4
        # Rows that are no anchors of the term have one block of zeros.
        row_weights, column_weights = _integer(visit + 5), _integer(visit + 6)
        own = weights + row_weights + tl.where(row_weights > 0, row_start, 0) + tl.arange(0, R)
        row_n, row_push = tl.load(own), tl.load(own + plane) * push
        row_pull = tl.load(own + 2 * plane) * row_n * pull
        step = tl.where(column_weights > 0, Q, 0)
        begin, end = _tiles(work, visit)
        for tile in range(begin, end):
            start = tile * Q
            other = weights + column_weights + tile * step + tl.arange(0, Q)
            if PIECE == WIDTH:
                y_high, y_low = _both_parts(columns, start, 0, Q, WIDTH, WIDTH, SPLIT)
                cosines = tl.zeros((R, Q), tl.float32)
                cosines = _products(x_high, x_low, y_high, y_low, cosines, SPLIT)
            else:
                cosines = _cosines(rows, row_start, columns, start, R, Q, WIDTH, PIECE, SPLIT)
            e = tl.exp2(cosines * k - k)
            low, high = _label_range(ranges, column_place + start, Q)
            if (low < 0) | ((row_low <= high) & (low <= row_high)):
                found = tl.load(labels + column_place + start + tl.arange(0, Q))[None, :]
                column_n = tl.load(other)[None, :]
                d = row_pull[:, None] * _reciprocal(e + row_n[:, None])
                d += (
                    tl.load(other + 2 * plane)[None, :]
                    * pull
                    * column_n
                    * _reciprocal(e + column_n)
                )
                both = row_push[:, None] + tl.load(other + plane)[None, :] * push
                d = tl.where(row_labels[:, None] == found, -d, e * both)
                alone = (row_start + tl.arange(0, R))[:, None] - start == tl.arange(0, Q)[None, :]
                d = tl.where((found < 0) | (alone & (excluded > 0)), 0.0, d)
            else:
                d = e * (row_push[:, None] + tl.load(other + plane)[None, :] * push)
            if PIECE < WIDTH:
                y_high, y_low = _both_parts(columns, start, out, Q, WIDTH, OUT, SPLIT)
            d_high = d.to(tl.float16)
            if SPLIT:
                d_low = (d - d_high.to(tl.float32)).to(tl.float16)
                total = tl.dot(d_low, y_high, total)
                total = tl.dot(d_high, y_low, total)
            total = tl.dot(d_high, y_high, total)
    target = tl.load(work + 6) * WIDTH + out + tl.arange(0, R)[:, None] * WIDTH
    elements = tl.arange(0, OUT)[None, :]
    tl.store(gradients + target + elements, total * (biggest * (0.6931471805599453 / 4096.0)))


@jit
def add_up(table, work_at, labels, gradients, results, WIDTH: tl.constexpr):
    """Adds up the shares of the gradient of 32 rows; zeros for rows that are none."""
    work = table + work_at + tl.program_id(0) * 8
    entry = table + tl.load(work) * 10
    start = _integer(work + 1)
    rows, elements = start + tl.arange(0, 32), tl.arange(0, WIDTH)[None, :]
    place = gradients + (tl.load(work + 2) + rows)[:, None] * WIDTH + elements
    stride = tl.load(work + 3) * WIDTH
    total = tl.zeros((32, WIDTH), tl.float32)
    for _ in range(_integer(work + 4)):
        total += tl.load(place)
        place += stride
    found = tl.load(labels + _integer(entry + 4) + rows)
    width = _integer(entry + 7)
    target = results + tl.load(work + 5) + tl.cast(rows, tl.int64)[:, None] * width + elements
    inside = (rows < _integer(entry + 6))[:, None] & (elements < width)
    tl.store(target, tl.where((found >= 0)[:, None], total, 0.0), mask=inside)
