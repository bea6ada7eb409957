package nri

import (
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// metrics are the daemon's. Those about dumps and restores count what the
// node's log says since the daemon started.
type metrics struct {
	registry *prometheus.Registry

	dumps, restores, events         *prometheus.CounterVec
	dumpSeconds, restoreSeconds     prometheus.Histogram
	frozenSeconds                   prometheus.Histogram
	dumpBytes                       prometheus.Counter
	checkpoints, rebooted           *prometheus.GaugeVec
	storeBytes, freeBytes           prometheus.Gauge
	connected                       prometheus.Gauge
	requests                        *prometheus.HistogramVec
	gcRemoved, dropped, skippedLine prometheus.Counter
}

// reasonCodes are those of package event: a label must not grow without bound.
var reasonCodes = []string{"missing", "corrupt", "mismatch", "incompatible", "criu", "no-space", "busy",
	"unsupported", "timeout", "aborted", "invalid", "crash-loop", "memory-limit", "pager", "hook", "missed", "internal"}

func newMetrics(version string) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "stasis", Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "stasis", Name: name, Help: help})
	}
	seconds := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "stasis", Name: name, Help: help,
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}})
	}
	m := &metrics{
		registry:       prometheus.NewRegistry(),
		dumps:          counter("dumps_total", "Dumps of stopping containers, by result (ok, failed) and reason.", "result", "reason"),
		restores:       counter("restores_total", "Starts for which there was a checkpoint, by result (ok, cold-start, failed) and reason.", "result", "reason"),
		events:         counter("events_total", "Events in the node's log, by type.", "type"),
		dumpSeconds:    seconds("dump_duration_seconds", "From the stop request to the committed checkpoint."),
		restoreSeconds: seconds("restore_duration_seconds", "From the create request to the running container."),
		frozenSeconds:  seconds("dump_frozen_seconds", "Of a dump, the time during which CRIU had the tasks frozen."),
		dumpBytes:      counter("dump_bytes_total", "Bytes of committed checkpoints.").WithLabelValues(),
		checkpoints: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "stasis", Name: "checkpoints",
			Help: "Checkpoints in the store, by state."}, []string{"state"}),
		rebooted: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "stasis", Name: "reboot_containers",
			Help: "Containers that the node was prepared with before its last reboot, by what became of them."}, []string{"state"}),
		storeBytes: gauge("store_bytes", "Bytes of the checkpoints in the store."),
		freeBytes:  gauge("store_free_bytes", "Free bytes of the store's file system."),
		connected:  gauge("nri_connected", "1 while the runtime has accepted the plugin."),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "stasis", Name: "nri_request_duration_seconds",
			Help:    "Time to answer a request of the runtime, by method.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2}}, []string{"method"}),
		gcRemoved:   counter("gc_removed_total", "Checkpoints that garbage collection removed.").WithLabelValues(),
		dropped:     counter("events_dropped_total", "Events of the daemon that could not be written.").WithLabelValues(),
		skippedLine: counter("event_lines_skipped_total", "Lines of the node's log that are no events.").WithLabelValues(),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "stasis", Name: "build_info", Help: "1, labelled with the version.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()}})
	build.Set(1)
	m.registry.MustRegister(m.dumps, m.restores, m.events, m.dumpSeconds, m.restoreSeconds, m.frozenSeconds, m.dumpBytes, m.checkpoints, m.rebooted,
		m.storeBytes, m.freeBytes, m.connected, m.requests, m.gcRemoved, m.dropped, m.skippedLine, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// So that a rate exists from the first one on.
	m.dumps.WithLabelValues("ok", "")
	m.restores.WithLabelValues("ok", "")
	m.reboot(nil)
	return m
}

// observe counts one event of the log.
func (m *metrics) observe(e event.Event) {
	reason := e.ReasonCode
	if reason != "" && !slices.Contains(reasonCodes, reason) {
		reason = "other"
	}
	seconds := float64(e.DurationMicros) / 1e6
	switch e.Type {
	case event.Dumped:
		m.dumps.WithLabelValues("ok", "").Inc()
		m.dumpSeconds.Observe(seconds)
		m.dumpBytes.Add(float64(max(e.SizeBytes, 0)))
		if e.Timings != nil {
			m.frozenSeconds.Observe(float64(e.Timings.FrozenMicros) / 1e6)
		}
	case event.DumpFailed:
		m.dumps.WithLabelValues("failed", reason).Inc()
	case event.Restored:
		m.restores.WithLabelValues("ok", "").Inc()
		m.restoreSeconds.Observe(seconds)
	case event.ColdStart:
		m.restores.WithLabelValues("cold-start", reason).Inc()
	case event.RestoreFail:
		m.restores.WithLabelValues("failed", reason).Inc()
	case event.Quarantined, event.Ignored, event.Removed, event.PromoteFail:
	default:
		m.events.WithLabelValues("other").Inc()
		return
	}
	m.events.WithLabelValues(string(e.Type)).Inc()
}

// storeFigures are what a list of the store comes to.
type storeFigures struct {
	Checkpoints map[store.State]int `json:"checkpoints"`
	Bytes       int64               `json:"bytes"`
	FreeBytes   int64               `json:"freeBytes"`
}

func figures(records []store.Record, free int64) storeFigures {
	f := storeFigures{Checkpoints: map[store.State]int{store.Committed: 0, store.Claimed: 0, store.Quarantined: 0, store.Corrupt: 0}, FreeBytes: free}
	for _, r := range records {
		f.Checkpoints[r.State]++
		if r.Manifest != nil {
			f.Bytes += r.Manifest.Sizes.TotalBytes
		}
	}
	return f
}

func (m *metrics) store(f storeFigures) {
	for state, n := range f.Checkpoints {
		m.checkpoints.WithLabelValues(string(state)).Set(float64(n))
	}
	m.storeBytes.Set(float64(f.Bytes))
	m.freeBytes.Set(float64(f.FreeBytes))
}

// reboot takes the report of the last reboot; nil, and one of a node that has
// not gone down yet, count nobody.
func (m *metrics) reboot(r *reboot.NodeReport) {
	for _, state := range reboot.States {
		n := 0
		if r != nil && r.Rebooted {
			n = r.Counts[state]
		}
		m.rebooted.WithLabelValues(string(state)).Set(float64(n))
	}
}

// request measures until the function that it returns is called.
func (m *metrics) request(method string) func() {
	start := time.Now()
	return func() { m.requests.WithLabelValues(method).Observe(time.Since(start).Seconds()) }
}
