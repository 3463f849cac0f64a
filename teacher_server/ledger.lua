-- Every change of the ledger, each an atomic step. ARGV: key prefix, operation, arguments as JSON; the reply is JSON.
--
--   tenants                     set     those with lines
--   days:TENANT                 set     "2026-01-31", UTC
--   lines:TENANT:DAY            hash    JOB FINGERPRINT PRICE CURRENCY COLUMN -> count (fields joined by tabs)
--   hours:TENANT:DAY            hash    HOUR and then as in lines -> count; forgotten after some weeks
--   hours_since                 string  the day after which all hours are there; "" where there was no ledger before
--   owners                      set     "TENANT\tJOB" of all budgets; a tenant's own has no job
--   budgets:TENANT\tJOB         set     "UNIT\tPERIOD"
--   budget:TENANT\tJOB\tUNIT\tPERIOD   hash   limit, spent:INSTANCE, held:INSTANCE; an instance is a day, month or "total"
--   leases                      zset    lease -> expiry in ms: what a replica holds of budgets, ahead of its charges
--   lease:LEASE                 hash    samples, budgets
--   request:TENANT\tJOB\tID     hash    digest, finished, paid: positions of the query that were charged, "0-15,32-47"
--   teacher:FINGERPRINT         hash    name, flops, price, currency
--   epochs                      hash    a replica's run -> its last posting that was applied, and RUN\tforwarded -> samples
--   totals                      hash    forwarded, device_nanoseconds: what replicas measured, whoever paid; and
--                                       charged, wasted, own: the sums of the lines' computed samples
--   version                     count   of changes of budgets
--   audit                       stream  changes of budgets and prices
--   restoring:NAME                      a key of a backup that is being put back
--
-- The account _platform has, as its jobs, what nobody is charged for: own/REASON and wasted/REASON.
local P = ARGV[1]
local args = cjson.decode(ARGV[3])
local call = redis.call
local TAB = '\t'

local function whole(x) return string.format('%.0f', x) end

local function now_ms()
  local time = call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function instance(period, day)
  if period == 'day' then return day elseif period == 'month' then return string.sub(day, 1, 7) end
  return 'total'
end

local function get(key, field) return tonumber(call('HGET', key, field) or 0) end

local function increase(key, field, amount)
  if amount == 0 then return end
  if call('HINCRBY', key, field, whole(amount)) == 0 then call('HDEL', key, field) end
end

-- The budgets that a job's samples draw on: its tenant's and its own. `unit` is what one sample takes.
local function budgets_of(tenant, job, day, price)
  local found = {}
  for _, owner in ipairs({tenant .. TAB, tenant .. TAB .. job}) do
    for _, kind in ipairs(call('SMEMBERS', P .. 'budgets:' .. owner)) do
      local unit, period = string.match(kind, '(.+)\t(.+)')
      local key = P .. 'budget:' .. owner .. TAB .. kind
      local at = instance(period, day)
      local values = call('HMGET', key, 'limit', 'spent:' .. at, 'held:' .. at)
      found[#found + 1] = {
        key = key, tenant = tenant, job = string.sub(owner, #tenant + 2), unit = unit, period = period, instance = at,
        each = unit == 'samples' and 1 or price,
        limit = tonumber(values[1]), spent = tonumber(values[2] or 0), held = tonumber(values[3] or 0),
      }
    end
  end
  return found
end

-- Its counts as strings: as numbers, JSON gets 14 digits of them.
local function described(b)
  return {tenant = b.tenant, job = b.job, unit = b.unit, period = b.period, instance = b.instance,
          limit = whole(b.limit), spent = whole(b.spent), held = whole(b.held)}
end

-- Gives `samples` of a lease back to the budgets that it holds them of; all of it, and the lease, without a number.
local function give_back(lease, samples)
  local key = P .. 'lease:' .. lease
  local left = get(key, 'samples')
  samples = math.min(samples or left, left)
  if samples == 0 then return end
  for _, part in ipairs(cjson.decode(call('HGET', key, 'budgets') or '[]')) do
    if call('EXISTS', part[1]) == 1 then increase(part[1], 'held:' .. part[2], -samples * part[3]) end
  end
  call('HINCRBY', key, 'samples', whole(-samples))
end

local function reap()
  local late = call('ZRANGEBYSCORE', P .. 'leases', '-inf', whole(now_ms()), 'LIMIT', 0, 100)
  for _, lease in ipairs(late) do
    give_back(lease)
    call('DEL', P .. 'lease:' .. lease)
    call('ZREM', P .. 'leases', lease)
  end
end

local function audit(...)
  call('XADD', P .. 'audit', '*', ...)
end

-- line: tenant, job, day, hour, forget (when its hours are dropped), fingerprint, price, currency
local function count(line, column, amount)
  if amount == 0 then return end
  local field = table.concat({line.job, line.fingerprint, whole(line.price), line.currency, column}, TAB)
  local hours = P .. 'hours:' .. line.tenant .. ':' .. line.day
  if call('HINCRBY', hours, line.hour .. TAB .. field, whole(amount)) == amount then
    call('EXPIREAT', hours, whole(line.forget))
  end
  if call('HINCRBY', P .. 'lines:' .. line.tenant .. ':' .. line.day, field, whole(amount)) == amount then
    call('SADD', P .. 'days:' .. line.tenant, line.day)
    call('SADD', P .. 'tenants', line.tenant)
  end
end

local function waste(line, reason, samples, nanoseconds)
  local platform = {tenant = '_platform', job = reason, day = line.day, hour = line.hour, forget = line.forget,
                    fingerprint = line.fingerprint, price = 0, currency = line.currency}
  increase(P .. 'totals', 'wasted', samples)
  count(platform, 'computed', samples)
  count(platform, 'device_nanoseconds', nanoseconds)
end

-- A ledger that was begun by a version without hours and without sums of its accounts: the sums are made once.
local function begin_sums()
  local since = ''
  for _, tenant in ipairs(call('SMEMBERS', P .. 'tenants')) do
    for _, day in ipairs(call('SMEMBERS', P .. 'days:' .. tenant)) do
      if day > since then since = day end
      local values = call('HGETALL', P .. 'lines:' .. tenant .. ':' .. day)
      for i = 1, #values, 2 do
        local account, column = string.match(values[i], '^([^/\t]*).*\t([^\t]*)$')
        if column == 'computed' then
          increase(P .. 'totals', tenant == '_platform' and account or 'charged', tonumber(values[i + 1]))
        end
      end
    end
  end
  call('SET', P .. 'hours_since', since)
end

-- The set of positions that a text such as "0-15,32-47" stands for, and back.
local function positions_of(text)
  local set = {}
  for first, last in string.gmatch(text, '(%d+)-(%d+)') do
    for position = tonumber(first), tonumber(last) do set[position] = true end
  end
  return set
end

local function text_of(set)
  local sorted, runs = {}, {}
  for position in pairs(set) do sorted[#sorted + 1] = position end
  table.sort(sorted)
  for i, position in ipairs(sorted) do
    if position - 1 ~= sorted[i - 1] then runs[#runs + 1] = {position, position} end
    runs[#runs][2] = position
  end
  for i, run in ipairs(runs) do runs[i] = run[1] .. '-' .. run[2] end
  return table.concat(runs, ',')
end

-- Samples that a forward pass ran for: charged as far as the request and the budgets allow, the rest wasted.
-- entry: request id or "", samples, nanoseconds, lease or "", and with an id the samples' positions in their query
local function charge(line, entry)
  local id, samples, nanoseconds, lease = entry[1], entry[2], entry[3], entry[4]
  local owed, reason = samples, 'wasted/unpaid'
  local request = P .. 'request:' .. line.tenant .. TAB .. line.job .. TAB .. id
  local paid, fresh = {}, {}
  if id ~= '' then
    paid = positions_of(call('HGET', request, 'paid') or '')
    for position in pairs(positions_of(entry[5])) do
      if not paid[position] then fresh[#fresh + 1] = position end
    end
    owed = math.min(samples, #fresh)
    if owed < samples then reason = 'wasted/replay' end
  end
  local covered, from = {}, 0
  if lease ~= '' then
    from = math.min(get(P .. 'lease:' .. lease, 'samples'), samples)
    for _, part in ipairs(cjson.decode(call('HGET', P .. 'lease:' .. lease, 'budgets') or '[]')) do
      covered[part[1] .. TAB .. part[2]] = true
    end
  end
  local budgets = budgets_of(line.tenant, line.job, line.day, line.price)
  for _, b in ipairs(budgets) do
    if b.each > 0 then
      local room = math.floor((b.limit - b.spent - b.held) / b.each)
      if covered[b.key .. TAB .. b.instance] then room = room + from end
      if room < owed then owed, reason = math.max(0, room), 'wasted/unpaid' end
    end
  end
  if from > 0 then give_back(lease, from) end
  for _, b in ipairs(budgets) do increase(b.key, 'spent:' .. b.instance, owed * b.each) end
  local share = owed == samples and nanoseconds or math.floor(nanoseconds * owed / samples)
  if id ~= '' and owed > 0 then
    for i = 1, owed do paid[fresh[i]] = true end
    call('HSET', request, 'paid', text_of(paid))
    call('PEXPIRE', request, whole(args.request_ms))
  end
  count(line, 'computed', owed)
  increase(P .. 'totals', line.tenant == '_platform' and string.match(line.job, '^[^/]*') or 'charged', owed)
  count(line, 'money_nanos', owed * line.price)
  count(line, 'device_nanoseconds', share)
  if owed < samples then waste(line, reason, samples - owed, nanoseconds - share) end
end

local operations = {}

-- {tenant, job, id, digest, request_ms}: "new", "finished" (a repetition costs nothing), or "other" (another content)
function operations.begin()
  local key = P .. 'request:' .. args.tenant .. TAB .. args.job .. TAB .. args.id
  call('HSETNX', key, 'digest', args.digest)
  call('PEXPIRE', key, whole(args.request_ms))
  if call('HGET', key, 'digest') ~= args.digest then return 'other' end
  return call('HEXISTS', key, 'finished') == 1 and call('HEXISTS', key, 'paid') == 1 and 'finished' or 'new'
end

-- {tenant, job, day, price, need, more, lease, lease_ms}: holds `need` samples, and up to `more` while there is plenty
function operations.hold()
  reap()
  local budgets = budgets_of(args.tenant, args.job, args.day, args.price)
  local grant, reserved = args.need + args.more, nil
  for _, b in ipairs(budgets) do
    if b.each > 0 then
      if b.spent + args.need * b.each > b.limit then return {refused = 'spent', budget = described(b)} end
      local room = math.floor((b.limit - b.spent - b.held) / b.each)
      if room < args.need then reserved = b end
      grant = math.min(grant, args.need + math.floor(math.max(0, room - args.need) / 4))
    end
  end
  if reserved then return {refused = 'reserved', budget = described(reserved)} end
  local key, parts = P .. 'lease:' .. args.lease, {}
  for i, b in ipairs(budgets) do parts[i] = {b.key, b.instance, b.each} end
  -- What a lease holds is held of all its budgets alike: where others were set since, begin another lease.
  if get(key, 'samples') > 0 and call('HGET', key, 'budgets') ~= cjson.encode(parts) then return {refused = 'lease'} end
  for _, b in ipairs(budgets) do
    increase(b.key, 'held:' .. b.instance, grant * b.each)
    b.held = b.held + grant * b.each
  end
  call('HSET', key, 'samples', whole(get(key, 'samples') + grant), 'budgets', cjson.encode(parts))
  call('ZADD', P .. 'leases', whole(now_ms() + args.lease_ms), args.lease)
  local states = {}
  for i, b in ipairs(budgets) do states[i] = described(b) end
  return {granted = grant, budgets = states}
end

-- {epoch, base, posting, lines, totals, release, renew, lease_ms, request_ms, watch}
-- Postings of an epoch are applied once each and in their order; one that comes too early tells from where to repeat.
-- `base` is the last one that the replica cannot repeat: Redis may be behind it only where it was put back by hand.
function operations.apply()
  reap()
  local applied, gone = get(P .. 'epochs', args.epoch), nil
  if applied < args.base then
    gone = {applied + 1, args.base}
    audit('what', 'postings lost by Redis', 'epoch', args.epoch, 'after', whole(applied), 'until', whole(args.base))
    applied = args.base
    call('HSET', P .. 'epochs', args.epoch, whole(applied))
  end
  if args.posting == applied + 1 then
    if call('EXISTS', P .. 'hours_since') == 0 then begin_sums() end
    for _, line in ipairs(args.lines) do
      for _, entry in ipairs(line.charges) do charge(line, entry) end
      for _, column in ipairs({'asked', 'cached', 'coalesced', 'unasked'}) do count(line, column, line[column]) end
      for _, id in ipairs(line.finished) do
        local key = P .. 'request:' .. line.tenant .. TAB .. line.job .. TAB .. id
        call('HSET', key, 'finished', 1)
        call('PEXPIRE', key, whole(args.request_ms))
      end
    end
    increase(P .. 'totals', 'forwarded', args.totals[1])
    increase(P .. 'epochs', args.epoch .. TAB .. 'forwarded', args.totals[1])
    increase(P .. 'totals', 'device_nanoseconds', args.totals[2])
    call('HSET', P .. 'epochs', args.epoch, whole(args.posting))
    applied = args.posting
  end
  for _, part in ipairs(args.release) do give_back(part[1], part[2]) end
  local lost = {}
  for _, lease in ipairs(args.renew) do
    if call('ZSCORE', P .. 'leases', lease) then
      call('ZADD', P .. 'leases', whole(now_ms() + args.lease_ms), lease)
    else
      lost[#lost + 1] = lease
    end
  end
  local states = {}
  for _, who in ipairs(args.watch) do
    for _, b in ipairs(budgets_of(who[1], who[2], who[3], 0)) do states[#states + 1] = described(b) end
  end
  return {applied = applied, forwarded = get(P .. 'epochs', args.epoch .. TAB .. 'forwarded'),
          version = tonumber(call('GET', P .. 'version') or 0), budgets = states, lost = lost, gone = gone}
end

-- {tenant, job, unit, period, day, limit or false, who}: sets or removes one; what was spent already counts
function operations.budget()
  local owner, kind = args.tenant .. TAB .. args.job, args.unit .. TAB .. args.period
  local key = P .. 'budget:' .. owner .. TAB .. kind
  local old = call('HGET', key, 'limit')
  if not args.limit and not old then return false end
  if not args.limit then
    call('DEL', key)
    call('SREM', P .. 'budgets:' .. owner, kind)
    if call('EXISTS', P .. 'budgets:' .. owner) == 0 then call('SREM', P .. 'owners', owner) end
  else
    if not old then
      local column = args.unit == 'samples' and 'computed' or 'money_nanos'
      for _, day in ipairs(call('SMEMBERS', P .. 'days:' .. args.tenant)) do
        local values = call('HGETALL', P .. 'lines:' .. args.tenant .. ':' .. day)
        for i = 1, #values, 2 do
          local job, name = string.match(values[i], '^([^\t]*)\t.*\t([^\t]*)$')
          if name == column and (args.job == '' or job == args.job) then
            increase(key, 'spent:' .. instance(args.period, day), tonumber(values[i + 1]))
          end
        end
      end
    end
    if not old then
      -- Removed and set anew, it still has to stand for what was held of it before.
      for _, lease in ipairs(call('ZRANGE', P .. 'leases', 0, -1)) do
        local held = P .. 'lease:' .. lease
        for _, part in ipairs(cjson.decode(call('HGET', held, 'budgets') or '[]')) do
          if part[1] == key then increase(key, 'held:' .. part[2], get(held, 'samples') * part[3]) end
        end
      end
    end
    call('HSET', key, 'limit', whole(args.limit))
    call('SADD', P .. 'budgets:' .. owner, kind)
    call('SADD', P .. 'owners', owner)
  end
  call('INCR', P .. 'version')
  audit('what', 'budget', 'who', args.who, 'tenant', args.tenant, 'job', args.job, 'unit', args.unit,
        'period', args.period, 'old', old or '', 'new', args.limit and whole(args.limit) or '')
  return old and tonumber(old) or false
end

-- {fingerprint, name, flops, price, currency, who}: what a teacher costs from now on
function operations.teacher()
  local key = P .. 'teacher:' .. args.fingerprint
  local old = call('HMGET', key, 'price', 'currency')
  call('SADD', P .. 'teachers', args.fingerprint)
  call('HSET', key, 'name', args.name, 'flops', args.flops, 'price', whole(args.price), 'currency', args.currency)
  if old[1] ~= whole(args.price) or old[2] ~= args.currency then
    audit('what', 'price', 'who', args.who, 'teacher', args.name, 'fingerprint', args.fingerprint,
          'old', old[1] and (old[1] .. ' ' .. old[2]) or '', 'new', whole(args.price) .. ' ' .. args.currency)
  end
  return true
end

-- {}: whose samples need a reservation
function operations.owners()
  return {version = tonumber(call('GET', P .. 'version') or 0), owners = call('SMEMBERS', P .. 'owners')}
end

-- {tenant, job, day}: the budgets that this job draws on
function operations.budgets()
  local states = {}
  for i, b in ipairs(budgets_of(args.tenant, args.job, args.day, 0)) do states[i] = described(b) end
  return states
end

-- {tenant or "", since, until, all}: keys as they are, [name, type, values], of one moment: the lines, and all the rest
function operations.snapshot()
  local found = {}
  local function take(name)
    local kind = call('TYPE', P .. name)['ok']
    local values = {}
    if kind == 'hash' then values = call('HGETALL', P .. name)
    elseif kind == 'set' then values = call('SMEMBERS', P .. name)
    elseif kind == 'zset' then values = call('ZRANGE', P .. name, 0, -1, 'WITHSCORES')
    elseif kind == 'stream' then values = call('XRANGE', P .. name, '-', '+')
    elseif kind == 'string' then values = {call('GET', P .. name)} end
    if kind ~= 'none' then found[#found + 1] = {name, kind, values} end
    return values
  end
  local tenants = args.tenant ~= '' and {args.tenant} or call('SMEMBERS', P .. 'tenants')
  for _, tenant in ipairs(tenants) do
    for _, day in ipairs(call('SMEMBERS', P .. 'days:' .. tenant)) do
      if day >= args.since and day <= args['until'] then
        take('lines:' .. tenant .. ':' .. day)
        if args.all then take('hours:' .. tenant .. ':' .. day) end
      end
    end
    if args.all then take('days:' .. tenant) end
  end
  for _, fingerprint in ipairs(take('teachers')) do take('teacher:' .. fingerprint) end
  if args.all then
    for _, name in ipairs({'tenants', 'totals', 'epochs', 'version', 'audit', 'hours_since'}) do take(name) end
    for _, owner in ipairs(take('owners')) do
      for _, kind in ipairs(take('budgets:' .. owner)) do take('budget:' .. owner .. TAB .. kind) end
    end
    for i, lease in ipairs(take('leases')) do
      if i % 2 == 1 then take('lease:' .. lease) end
    end
  end
  return found
end

-- {keys}: hashes of a snapshot, and when each is forgotten or false, kept apart until `restore`
function operations.stage()
  for _, key in ipairs(args.keys) do
    local name, values = P .. 'restoring:' .. key[1], key[3]
    call('DEL', name)
    for i = 1, #values, 2 do call('HSET', name, values[i], values[i + 1]) end
    if key[4] then call('EXPIREAT', name, whole(key[4])) end
  end
  return true
end

-- {staged, keys}: a whole snapshot, of which some keys were staged, put into a ledger that is empty; what was held at
-- its moment is not
function operations.restore()
  if call('EXISTS', P .. 'tenants', P .. 'owners', P .. 'teachers') > 0 then
    for _, name in ipairs(args.staged) do call('DEL', P .. 'restoring:' .. name) end
    return false
  end
  for _, name in ipairs(args.staged) do call('RENAME', P .. 'restoring:' .. name, P .. name) end
  for _, key in ipairs(args.keys) do
    local name, kind, values = P .. key[1], key[2], key[3]
    if kind == 'hash' and string.sub(key[1], 1, 6) ~= 'lease:' then
      for i = 1, #values, 2 do
        if string.sub(values[i], 1, 5) ~= 'held:' then call('HSET', name, values[i], values[i + 1]) end
      end
    elseif kind == 'set' then
      for _, value in ipairs(values) do call('SADD', name, value) end
    elseif kind == 'stream' then
      for _, entry in ipairs(values) do call('XADD', name, entry[1], unpack(entry[2])) end
    elseif kind == 'string' then
      call('SET', name, values[1])
    end
  end
  call('INCR', P .. 'version')
  audit('what', 'restored', 'who', args.who)
  return true
end

return cjson.encode(operations[ARGV[2]]())
