package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// DecisionTimeout bounds the answer to one request of the runtime.
const DecisionTimeout = time.Second

// errLate is the error of a lookup that was given up.
var errLate = errors.New("the store did not answer in time")

const (
	pluginName = "stasis"
	// registerTimeout bounds connecting, registering and being configured.
	registerTimeout = 10 * time.Second
	minBackoff      = 50 * time.Millisecond
	maxBackoff      = 2 * time.Second
	// maxLookups bounds the lookups that hang on a disk that does not answer.
	maxLookups = 16
)

// plugin answers the runtime. Its methods are called by the stub, one request
// after another, and on a new connection again by another stub.
type plugin struct {
	latest func(context.Context, checkpoint.Identity) (*checkpoint.Manifest, error)
	// template is [store.Store.LatestTemplate].
	template func(ctx context.Context, namespace, name string) (*checkpoint.Manifest, error)
	later    func(job) // never blocks
	metrics  *metrics
	pods     *pods
	lookups  chan struct{} // a token for each running lookup
	promoter *promoter     // nil where there is nobody to ask
	// runtimeDir is stasis's; empty gives no container a generation.
	runtimeDir string
	memory     checkpoint.Memory // of pods that do not say

	accepted chan struct{} // closed when the runtime accepted the plugin for the first time
	first    sync.Once     // closes accepted

	mu      sync.Mutex // guards what follows
	runtime string     // name and version; empty while not connected
	missed  map[string]missed
}

// job is work that a handler leaves to the daemon.
type job struct {
	events     []event.Event
	quarantine checkpoint.ID
	reason     string
	missed     *missed
}

// connection is the plugin as one stub sees it: a stub that was given up must
// not be configured any more.
type connection struct {
	*plugin
	ctx    context.Context // of the attempt
	synced chan struct{}
	once   sync.Once
}

// Configure implements stub.ConfigureInterface.
func (c *connection) Configure(_ context.Context, _, runtime, version string) (api.EventMask, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	c.mu.Lock()
	c.runtime = runtime + " " + version
	c.mu.Unlock()
	return 0, nil // what the methods of this type say
}

// Synchronize implements stub.SynchronizeInterface: after a start of the daemon
// or of the runtime, these are the pods that live.
func (c *connection) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	defer c.metrics.request("Synchronize")()
	c.plugin.pods.replace(pods)
	if c.promoter != nil {
		c.promoter.replace(pods, containers)
	}
	if c.runtimeDir != "" {
		var ids []string
		for _, ctr := range containers {
			ids = append(ids, ctr.GetId())
		}
		if err := checkpoint.KeepGenerations(c.runtimeDir, ids); err != nil {
			log.L.WithError(err).Warn("leftovers of removed containers")
		}
	}
	c.lookForMissed(pods, containers)
	c.metrics.connected.Set(1)
	log.L.WithFields(log.Fields{"op": "synchronize", "pods": len(pods), "containers": len(containers)}).Info("connected to the runtime")
	c.once.Do(func() { close(c.synced) })
	c.first.Do(func() { close(c.accepted) })
	return nil, nil
}

// RunPodSandbox implements stub.RunPodInterface.
func (c *connection) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	defer c.metrics.request("RunPodSandbox")()
	c.plugin.pods.add(pod)
	return nil
}

// RemovePodSandbox implements stub.RemovePodInterface.
func (c *connection) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	defer c.metrics.request("RemovePodSandbox")()
	c.plugin.pods.remove(pod)
	return nil
}

// CreateContainer implements stub.CreateContainerInterface.
func (c *connection) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	defer c.metrics.request("CreateContainer")()
	ctx, cancel := context.WithTimeout(ctx, DecisionTimeout)
	defer cancel()
	d := Decide(pod, ctr, c.memory, func(i checkpoint.Identity) (*checkpoint.Manifest, error) {
		return c.lookup(ctx, func() (*checkpoint.Manifest, error) { return c.latest(ctx, i) })
	}, func(namespace, name string) (*checkpoint.Manifest, error) {
		return c.lookup(ctx, func() (*checkpoint.Manifest, error) { return c.template(ctx, namespace, name) })
	})
	d.Events = c.plugin.pods.firstTold(pod.GetId(), d.Events)
	if len(d.Events) > 0 {
		j := job{events: d.Events, quarantine: d.Quarantine}
		if d.Quarantine != "" {
			j.reason = d.Events[len(d.Events)-1].Reason
		}
		c.later(j)
	}
	a := d.Adjustment()
	if m := c.mountGeneration(ctx, ctr, d); m != nil && d.Err == nil {
		a.AddMount(m)
	}
	return a, nil, d.Err
}

// lookup asks the store aside, for a system call cannot be cancelled.
func (p *plugin) lookup(ctx context.Context, find func() (*checkpoint.Manifest, error)) (*checkpoint.Manifest, error) {
	type answer struct {
		m   *checkpoint.Manifest
		err error
	}
	select {
	case p.lookups <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%d lookups hang: %w", maxLookups, errLate)
	}
	ch := make(chan answer, 1)
	go func() { // ends with the lookup; maxLookups bounds them
		defer func() { <-p.lookups }()
		m, err := find()
		for errors.Is(err, checkpoint.ErrBusy) && sleep(ctx, 50*time.Millisecond) {
			// Most likely claimed by the shim of the container's predecessor,
			// which has failed to start and is about to give it back.
			var again error
			if m, again = find(); ctx.Err() == nil {
				err = again
			}
		}
		ch <- answer{m, err}
	}()
	select {
	case a := <-ch:
		if a.err != nil && ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", errLate, a.err)
		}
		return a.m, a.err
	case <-ctx.Done():
		return nil, errLate
	}
}

// sleep waits, and reports whether a third of the time for a decision, or more,
// is left then.
func sleep(ctx context.Context, d time.Duration) bool {
	if end, ok := ctx.Deadline(); ok && time.Until(end)-d < DecisionTimeout/3 {
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// connect keeps the plugin registered with the runtime until ctx ends. It waits
// for a runtime that is absent or restarts, and says so once.
func (p *plugin) connect(ctx context.Context, socket, index string) {
	backoff, told := minBackoff, false
	for ctx.Err() == nil {
		synced, err := p.serve(ctx, socket, index)
		p.metrics.connected.Set(0)
		p.mu.Lock()
		p.runtime = ""
		p.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		if synced {
			backoff, told = minBackoff, false
		}
		l := log.G(ctx).WithError(err).WithField("socket", socket)
		if !told {
			l.Warn("not connected to the runtime, trying again")
			told = true
		} else {
			l.Debug("still not connected to the runtime")
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// serve makes one connection and serves it until it ends. It reports whether
// the runtime accepted it.
func (p *plugin) serve(ctx context.Context, socket, index string) (bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &connection{plugin: p, ctx: ctx, synced: make(chan struct{})}
	conn, err := (&net.Dialer{Timeout: registerTimeout}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	s, err := stub.New(c, stub.WithPluginName(pluginName), stub.WithPluginIdx(index),
		stub.WithConnection(conn), stub.WithLogger(debugLog{}))
	if err != nil {
		return false, err
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	late := time.NewTimer(registerTimeout)
	defer late.Stop()
	synced := c.synced
	for {
		select {
		case err := <-done:
			return synced == nil, err
		case <-synced:
			synced = nil
			late.Stop()
			continue
		case <-late.C:
			cancel(fmt.Errorf("the runtime did not register the plugin within %v", registerTimeout))
		case <-ctx.Done():
		}
		break
	}
	conn.Close()
	// Start of nri v0.12.5 waits for its Configure without a deadline. This
	// call ends that wait: our own Configure refuses by now.
	if synced != nil {
		if svc, ok := s.(api.PluginService); ok {
			go svc.Configure(context.Background(), &api.ConfigureRequest{}) // its channel has room for one answer
		}
	}
	select {
	case <-done:
	case <-time.After(registerTimeout):
		log.G(ctx).Warn("a connection to the runtime does not end")
	}
	return synced == nil, context.Cause(ctx)
}

// connectedTo is the runtime's name and version, empty while there is none.
func (p *plugin) connectedTo() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.runtime
}

// debugLog takes what the stub says, which the daemon says in its own words.
type debugLog struct{}

func (debugLog) Debugf(ctx context.Context, f string, a ...any) { log.G(ctx).Debugf(f, a...) }
func (debugLog) Infof(ctx context.Context, f string, a ...any)  { log.G(ctx).Debugf(f, a...) }
func (debugLog) Warnf(ctx context.Context, f string, a ...any)  { log.G(ctx).Debugf(f, a...) }
func (debugLog) Errorf(ctx context.Context, f string, a ...any) { log.G(ctx).Debugf(f, a...) }
