package nri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore/pager"

	"github.com/stasis-containers/stasis/nri/eventlog"
)

// Config is what the daemon is started with.
type Config struct {
	Root        string // of the store
	RuntimeDir  string // the daemon's socket, host facts, dump slots
	NRISocket   string
	PluginIndex string // two digits; a higher one sees what lower ones did
	// MetricsAddress is a TCP address to serve metrics on; empty for none.
	MetricsAddress string
	GC             store.Policy // without DeadPodUIDs
	GCInterval     time.Duration
	// ReadyTimeout bounds the wait for the runtime before systemd is told that
	// the daemon is ready. What systemd orders after it, the kubelet, creates
	// containers at once, and without the plugin they would be ordinary ones.
	ReadyTimeout time.Duration
	// InhibitShutdown holds up shutdowns of the node, by way of logind, until its
	// containers are dumped and KubeletUnit is stopped. ContainerdState is
	// containerd's state directory.
	InhibitShutdown bool
	KubeletUnit     string
	ContainerdState string
	// Memory holds for pods that do not say by annotation.
	Memory checkpoint.Memory
	// MaxLogBytes is the size at which the event log is rotated.
	MaxLogBytes int64
	Version     string
}

// Names within the runtime directory.
const (
	SocketName    = "stasisd.sock"
	HostFactsName = "host.json"
	lockName      = "stasisd.lock"
)

const (
	tickInterval = time.Second
	// figuresAge is how old the store's figures may become without an event.
	figuresAge = time.Minute
	// staleAfter is how long the main loop may be stuck before the daemon
	// counts as unhealthy.
	staleAfter      = 30 * time.Second
	shutdownTimeout = 5 * time.Second
	// factsRetry is the time until CRIU is asked again after a failure.
	factsRetry = 5 * time.Second
	jobQueue   = 1024
)

// Status is what the daemon says about itself at /status.
type Status struct {
	Version   string       `json:"version"`
	StartedAt time.Time    `json:"startedAt"`
	Healthy   bool         `json:"healthy"`
	Runtime   string       `json:"runtime"` // name and version; empty while not connected
	Connected bool         `json:"connected"`
	Pods      int          `json:"pods"` // sandboxes that the runtime told of
	Root      string       `json:"root"`
	Store     storeFigures `json:"store"`
	HostFacts string       `json:"hostFacts"` // "ok", or why a restore is not possible
	// Missed are containers of opted-in pods that are not dumped: they were
	// created while the daemon was not connected.
	Missed []reboot.Missed `json:"missed"`
	LastGC *GCReport       `json:"lastGC,omitempty"`
	// Reboot is how the containers fare that the node was prepared with, until
	// the next preparation; RebootError says why nobody knows.
	Reboot      *reboot.NodeReport `json:"reboot,omitempty"`
	RebootError string             `json:"rebootError,omitempty"`
}

// GCReport is what one run of garbage collection did.
type GCReport struct {
	Time      time.Time `json:"time"`
	Removed   int       `json:"removed"`
	SizeBytes int64     `json:"sizeBytes"`
	Error     string    `json:"error,omitempty"`
}

// server is the daemon while it runs.
type server struct {
	config  Config
	store   *store.Store
	plugin  *plugin
	metrics *metrics
	jobs    chan job
	started time.Time

	criuBinary criuFile    // of keepHostFacts
	reboot     rebootWatch // of loop

	mu           sync.Mutex
	lastTick     time.Time    // guarded by mu, as what follows
	figures      storeFigures // of figuresAt
	figuresAt    time.Time
	nextList     time.Time // not before
	lastGC       *GCReport
	hostFacts    string
	rebootReport *reboot.NodeReport // never changed, only replaced
	rebootError  string
}

// Run is the daemon: it serves until ctx ends, then returns nil. It does not
// need the runtime to be there. It fails where the store, the runtime directory
// or an address cannot be used, or where another daemon runs.
func Run(ctx context.Context, config Config) (err error) {
	st, err := store.Open(fsys.OS{}, config.Root)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(config.RuntimeDir, 0o700); err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	unlock, err := onlyOne(filepath.Join(config.RuntimeDir, lockName))
	if err != nil {
		return err
	}
	defer unlock()
	s := newServer(config, st)
	if s.reboot.bootID, err = checkpoint.BootID(); err != nil {
		return err
	}
	listeners, err := s.listen(ctx)
	if err != nil {
		return err
	}
	tail, err := eventlog.NewTailer(config.Root, false)
	if err != nil {
		for _, l := range listeners {
			l.Close()
		}
		return err
	}
	defer tail.Close()
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		s.serve(ctx, g, l)
	}
	working := make(chan struct{})
	g.Go(func() error { defer close(working); s.work(ctx); return nil })
	g.Go(func() error { s.plugin.connect(ctx, config.NRISocket, config.PluginIndex); return nil })
	g.Go(func() error { s.loop(ctx, tail); return nil })
	g.Go(func() error { s.collect(ctx); return nil })
	g.Go(func() error { s.plugin.promoter.run(ctx); return nil })
	g.Go(func() error { s.watchdog(ctx); return nil })
	facts := make(chan struct{})
	g.Go(func() error { s.keepHostFacts(ctx, facts); return nil })
	g.Go(func() error { s.reportReady(ctx, facts); return nil })
	g.Go(func() error { s.guard(ctx); return nil })
	log.G(ctx).WithFields(log.Fields{"version": config.Version, "root": config.Root, "runtime_dir": config.RuntimeDir}).Info("stasisd is up")
	<-ctx.Done()
	notify(ctx, daemon.SdNotifyStopping)
	err = g.Wait()
	log.G(ctx).Info("stasisd is down")
	return err
}

func newServer(config Config, st *store.Store) *server {
	m := newMetrics(config.Version)
	s := &server{config: config, store: st, metrics: m, jobs: make(chan job, jobQueue), started: time.Now(), lastTick: time.Now(), hostFacts: "not known yet"}
	s.reboot.root = config.Root
	pods := newPods()
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "stasis", Name: "pods",
		Help: "Pod sandboxes that the runtime told of."}, func() float64 { return float64(pods.count()) }))
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "stasis", Name: "missed_containers",
		Help: "Containers of opted-in pods that are not dumped, for they were created while the daemon was not connected."}, func() float64 { return float64(len(s.missedNow())) }))
	s.plugin = &plugin{latest: st.Latest, template: st.LatestTemplate, runtimeDir: config.RuntimeDir, memory: config.Memory, later: s.later, metrics: m, pods: pods,
		promoter: newPromoter(s.later, askShim(config.ContainerdState)),
		lookups:  make(chan struct{}, maxLookups), accepted: make(chan struct{})}
	return s
}

// onlyOne takes a lock that ends with the process.
func onlyOne(path string) (func() error, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is locked: another stasisd runs with this runtime directory", path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f.Close, nil
}

func (s *server) listen(ctx context.Context) (ls []net.Listener, err error) {
	path := filepath.Join(s.config.RuntimeDir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // ours: we hold the lock
		return nil, fmt.Errorf("socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	ls = append(ls, l)
	// Until here the directory's mode keeps others out.
	if err = os.Chmod(path, 0o600); err == nil && s.config.MetricsAddress != "" {
		if l, err = lc.Listen(ctx, "tcp", s.config.MetricsAddress); err == nil {
			ls = append(ls, l)
		}
	}
	if err != nil {
		ls[0].Close()
		return nil, fmt.Errorf("listen: %w", err)
	}
	return ls, nil
}

// serve answers HTTP requests until ctx ends. What a TCP address serves is
// metrics and health only.
func (s *server) serve(ctx context.Context, g *errgroup.Group, l net.Listener) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !s.healthy() {
			http.Error(w, "the main loop is stuck", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if l.Addr().Network() == "unix" {
		mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(s.status()); err != nil {
				log.G(ctx).WithError(err).Debug("status not sent")
			}
		})
	}
	srv := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
		return nil
	})
}

// later queues work of a handler; what does not fit is lost, and counted.
func (s *server) later(j job) {
	select {
	case s.jobs <- j:
	default:
		s.metrics.dropped.Add(float64(len(j.events)))
	}
}

// work does what handlers left, and at the end what is left of that.
func (s *server) work(ctx context.Context) {
	for {
		select {
		case j := <-s.jobs:
			s.do(ctx, j)
		case <-ctx.Done():
			for {
				select {
				case j := <-s.jobs:
					s.do(context.WithoutCancel(ctx), j)
				default:
					return
				}
			}
		}
	}
}

func (s *server) do(ctx context.Context, j job) {
	if j.missed != nil {
		s.supersede(ctx, *j.missed)
	}
	if j.quarantine != "" {
		if err := s.store.Quarantine(ctx, j.quarantine, j.reason, nil); err != nil {
			log.G(ctx).WithError(err).WithField("checkpoint_id", j.quarantine).Error("damaged checkpoint not set aside")
			j.events = j.events[:len(j.events)-1] // the last says that it was
		}
	}
	for _, e := range j.events {
		s.tell(ctx, e)
	}
}

// tell writes an event to the node's log and to the daemon's.
func (s *server) tell(ctx context.Context, e event.Event) {
	fields := log.Fields{"op": e.Type, "reason": e.Reason}
	for k, v := range map[string]string{"container_id": e.ContainerID, "sandbox_id": e.SandboxID, "checkpoint_id": string(e.CheckpointID)} {
		if v != "" {
			fields[k] = v
		}
	}
	if e.SizeBytes > 0 {
		fields["size_bytes"] = e.SizeBytes
	}
	switch l := log.G(ctx).WithFields(fields); e.Type {
	case event.Removed:
		l.Info("checkpoint removed")
	case event.PromoteFail:
		l.Warn("container not promoted")
	case event.Ignored:
		l.Warn("pod's annotations have no effect")
	case event.Quarantined:
		l.Warn("checkpoint set aside")
	case event.RestoreFail:
		l.Warn("start refused")
	default:
		l.Warn("checkpoint not used")
	}
	if err := event.Append(s.config.Root, e); err != nil {
		s.metrics.dropped.Inc()
		log.G(ctx).WithError(err).Error("event not written")
	}
}

// loop turns the log into metrics and into the report of the last reboot, rotates
// it, and keeps the figures fresh.
func (s *server) loop(ctx context.Context, tail *eventlog.Tailer) {
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	var lastErr string
	skipped, stale := 0, true
	for {
		err := tail.Poll(func(e event.Event) {
			s.metrics.observe(e)
			s.reboot.observe(e)
			stale = true
		})
		if s.followReboot(ctx) {
			stale = true
		}
		s.metrics.skippedLine.Add(float64(tail.Skipped() - skipped))
		skipped = tail.Skipped()
		if err == nil {
			_, err = eventlog.Rotate(s.config.Root, s.config.MaxLogBytes)
		}
		done, ferr := s.refresh(ctx, stale)
		stale = stale && !done
		if err == nil {
			err = ferr
		}
		if msg := fmt.Sprint(err); err != nil && msg != lastErr && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("metrics are not up to date")
			lastErr = msg
		} else if err == nil {
			lastErr = ""
		}
		s.mu.Lock()
		s.lastTick = time.Now()
		s.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// refresh lists the store again if its figures are old or something happened
// since. In a large store that takes long, so it rests nine times as long.
func (s *server) refresh(ctx context.Context, stale bool) (done bool, err error) {
	start := time.Now()
	s.mu.Lock()
	wait := start.Before(s.nextList) || !stale && start.Sub(s.figuresAt) < figuresAge
	s.mu.Unlock()
	if wait {
		return false, nil
	}
	defer func() {
		s.mu.Lock()
		s.nextList = time.Now().Add(9 * time.Since(start))
		s.mu.Unlock()
	}()
	records, err := s.store.List(ctx)
	if err != nil {
		return false, err
	}
	free, err := s.store.FreeBytes()
	if err != nil {
		return false, err
	}
	s.reboot.list(records)
	f := figures(records, free)
	s.metrics.store(f)
	s.mu.Lock()
	s.figures, s.figuresAt = f, time.Now()
	s.mu.Unlock()
	return true, nil
}

// collect tidies up and removes old checkpoints, now and at each interval.
func (s *server) collect(ctx context.Context) {
	tick := time.NewTicker(s.config.GCInterval)
	defer tick.Stop()
	for {
		s.sweep(ctx)
		s.gc(ctx)
		s.sweepHot(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *server) sweep(ctx context.Context) {
	r, err := s.store.Sweep(ctx)
	if err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Error("sweep")
	}
	if r.Stages+r.Trash+len(r.Released) > 0 {
		log.G(ctx).WithFields(log.Fields{"op": "sweep", "stages": r.Stages, "trash": r.Trash, "released": len(r.Released)}).Info("tidied up after processes that died")
	}
}

// sweepHot removes what was recorded of clones of templates that are gone.
func (s *server) sweepHot(ctx context.Context) {
	err := pager.SweepHot(s.config.RuntimeDir, func() (versions []checkpoint.ID, err error) {
		ts, err := s.store.Templates(ctx)
		for _, t := range ts {
			versions = append(versions, t.Version)
		}
		return versions, err
	})
	if err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Error("sweep")
	}
}

func (s *server) gc(ctx context.Context) {
	start := time.Now()
	policy := s.config.GC
	policy.DeadPodUIDs = s.plugin.pods.dead
	removals, err := s.store.GC(ctx, policy, false)
	report := &GCReport{Time: start, Removed: len(removals)}
	for _, r := range removals {
		report.SizeBytes += r.SizeBytes
		e := event.Event{Type: event.Removed, CheckpointID: r.ID, SizeBytes: r.SizeBytes, Reason: "gc: " + r.Reason}
		if r.Identity.Key != "" {
			e.Identity = &r.Identity
		}
		s.tell(ctx, e)
	}
	s.metrics.gcRemoved.Add(float64(len(removals)))
	if err != nil && ctx.Err() == nil {
		report.Error = err.Error()
		log.G(ctx).WithError(err).Error("garbage collection")
	}
	if err == nil {
		s.plugin.pods.prune()
	}
	s.mu.Lock()
	s.lastGC = report
	s.mu.Unlock()
	log.G(ctx).WithFields(log.Fields{"op": "gc", "duration_ms": time.Since(start).Milliseconds(), "removed": len(removals)}).Debug("garbage collected")
}

// criuFile tells one CRIU binary from another.
type criuFile struct {
	path  string
	mtime time.Time
	size  int64
}

// keepHostFacts writes the facts that shims compare at a restore, now and when
// CRIU's binary is another one. It closes written after the first time, or when
// there is no CRIU to wait for.
func (s *server) keepHostFacts(ctx context.Context, written chan<- struct{}) {
	for {
		wait := s.config.GCInterval
		known := s.writeHostFacts(ctx)
		if !known {
			wait = min(wait, factsRetry)
		}
		if _, err := exec.LookPath(criu.Binary); written != nil && (known || err != nil) {
			close(written)
			written = nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// writeHostFacts reports whether the file has the facts of the CRIU that is
// installed.
func (s *server) writeHostFacts(ctx context.Context) bool {
	binary := criuFile{}
	if path, err := exec.LookPath(criu.Binary); err == nil {
		if st, err := os.Stat(path); err == nil {
			binary = criuFile{path, st.ModTime(), st.Size()}
		}
	}
	if binary == s.criuBinary && binary.path != "" {
		return true
	}
	h, err := criu.HostFacts(ctx)
	if err == nil {
		err = criu.WriteHostFacts(filepath.Join(s.config.RuntimeDir, HostFactsName), h)
	}
	state := "ok"
	if err != nil {
		state = err.Error()
	} else {
		s.criuBinary = binary
	}
	s.mu.Lock()
	told := s.hostFacts == state
	s.hostFacts = state
	s.mu.Unlock()
	switch l := log.G(ctx).WithField("op", "host-facts"); {
	case err == nil:
		l.WithField("criu", h.CRIUVersion).Info("host facts written")
	case !told && ctx.Err() == nil:
		l.WithError(err).Error("no host facts yet: nothing can be restored on this node")
	}
	return err == nil
}

func (s *server) healthy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.lastTick) < staleAfter
}

func (s *server) status() Status {
	healthy, missed := s.healthy(), s.missedNow()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.plugin.connectedTo()
	return Status{Version: s.config.Version, StartedAt: s.started, Healthy: healthy, Runtime: r, Connected: r != "",
		Pods: s.plugin.pods.count(), Missed: missed, Root: s.config.Root, Store: s.figures, HostFacts: s.hostFacts, LastGC: s.lastGC,
		Reboot: s.rebootReport, RebootError: s.rebootError}
}

// reportReady tells systemd that the daemon is up when the runtime has accepted
// it and the host facts are written, or after ReadyTimeout.
func (s *server) reportReady(ctx context.Context, facts <-chan struct{}) {
	late := time.NewTimer(s.config.ReadyTimeout)
	defer late.Stop()
	accepted := s.plugin.accepted
	for accepted != nil || facts != nil {
		select {
		case <-accepted:
			accepted = nil
			continue
		case <-facts:
			facts = nil
			continue
		case <-ctx.Done():
			return
		case <-late.C:
		}
		log.G(ctx).WithFields(log.Fields{"socket": s.config.NRISocket, "connected": accepted == nil, "host_facts": facts == nil}).
			Warn("ready too early: containers that are created now may be ordinary ones")
		break
	}
	notify(ctx, daemon.SdNotifyReady)
}

// watchdog tells systemd that the daemon is alive, if systemd asked for it.
func (s *server) watchdog(ctx context.Context) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval <= 0 {
		return
	}
	tick := time.NewTicker(interval / 3)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if s.healthy() {
				notify(ctx, daemon.SdNotifyWatchdog)
			}
		case <-ctx.Done():
			return
		}
	}
}

func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warn("systemd not notified")
	}
}
