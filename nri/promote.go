package nri

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

const (
	// promoteTimeout bounds one attempt.
	promoteTimeout = 5 * time.Minute
	// promoteAttempts is how often one container is tried.
	promoteAttempts = 4
	// After a failure the template rests for promoteBackoff, twice as long after
	// each further one, up to promoteMaxBackoff, whichever container it was.
	promoteBackoff    = 30 * time.Second
	promoteMaxBackoff = 30 * time.Minute
)

// promoter makes templates of the containers whose pods ask for it, when they
// have run for long enough and there is no template yet that fits. It only asks
// their shims, which know what fits, and leave the container as it was in any
// case. One is asked at a time, the one that is due first.
type promoter struct {
	// promote is [control.Server.Promote] by the container's shim.
	promote func(ctx context.Context, containerID string) (control.Promotion, error)
	later   func(job)
	wake    chan struct{} // has room for one

	mu         sync.Mutex            // guards what follows
	candidates map[string]*candidate // by container ID
	resting    map[templateName]rest
}

// candidate is a container that may become a template.
type candidate struct {
	template templateName
	due      time.Time
	failures int
	event    event.Event // as far as it tells who the container is
}

type templateName struct{ namespace, name string }

// rest is the state of a template that could not be made.
type rest struct {
	until    time.Time
	failures int
}

func newPromoter(later func(job), promote func(context.Context, string) (control.Promotion, error)) *promoter {
	return &promoter{promote: promote, later: later, wake: make(chan struct{}, 1),
		candidates: map[string]*candidate{}, resting: map[templateName]rest{}}
}

// started takes a container that has just been started.
func (p *promoter) started(pod *api.PodSandbox, c *api.Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addLocked(pod, c, time.Now())
}

// replace takes the runtime's list: after a start of the daemon or of the
// runtime, the containers that run are candidates again.
func (p *promoter) replace(pods []*api.PodSandbox, containers []*api.Container) {
	live := bySandbox(pods)
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.candidates
	p.candidates = map[string]*candidate{}
	for _, c := range containers {
		pod := live[c.GetPodSandboxId()]
		if pod == nil || c.GetState() != api.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if known := old[c.GetId()]; known != nil {
			p.candidates[c.GetId()] = known
			continue
		}
		since := time.Now()
		if at := c.GetStartedAt(); at > 0 && time.Unix(0, at).Before(since) {
			since = time.Unix(0, at)
		}
		p.addLocked(pod, c, since)
	}
}

// addLocked makes a container a candidate if its pod says so. What is wrong with
// the annotations was told when it was created.
func (p *promoter) addLocked(pod *api.PodSandbox, c *api.Container, since time.Time) {
	s, err := checkpoint.ParseSettings(pod.GetAnnotations(), c.GetName())
	if err != nil || s.PromoteAfter == 0 {
		return
	}
	identity := identityOf(pod, c.GetName(), s)
	p.candidates[c.GetId()] = &candidate{
		template: templateName{pod.GetNamespace(), s.Template}, due: since.Add(s.PromoteAfter),
		event: event.Event{
			Type: event.PromoteFail, Identity: &identity,
			PodName: pod.GetName(), PodUID: pod.GetUid(), SandboxID: pod.GetId(), ContainerID: c.GetId(),
		},
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// forget drops a container that was removed.
func (p *promoter) forget(containerID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.candidates, containerID)
}

// run promotes until ctx ends.
func (p *promoter) run(ctx context.Context) {
	for ctx.Err() == nil {
		id, wait := p.next(time.Now())
		if id != "" {
			p.attempt(ctx, id)
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-p.wake:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// next is the container to be tried now, or the time until there may be one.
func (p *promoter) next(now time.Time) (id string, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first time.Time
	for cid, c := range p.candidates { // of those that wait for the same moment, who failed comes last
		at := c.due
		if until := p.resting[c.template].until; until.After(at) {
			at = until
		}
		if id == "" || cmp.Or(at.Compare(first), cmp.Compare(c.failures, p.candidates[id].failures), cmp.Compare(cid, id)) < 0 {
			id, first = cid, at
		}
	}
	for name, r := range p.resting { // nobody waits for these
		if now.Sub(r.until) > 2*promoteMaxBackoff {
			delete(p.resting, name)
		}
	}
	switch {
	case id == "":
		return "", time.Hour
	case first.After(now):
		return "", first.Sub(now)
	}
	return id, 0
}

// attempt asks for one promotion, and notes what came of it.
func (p *promoter) attempt(ctx context.Context, id string) {
	p.mu.Lock()
	c := p.candidates[id]
	p.mu.Unlock()
	if c == nil {
		return // removed just now
	}
	begin := time.Now()
	attempt, cancel := context.WithTimeout(ctx, promoteTimeout)
	r, err := p.promote(attempt, id)
	cancel()
	if ctx.Err() != nil {
		return // the next daemon tries again
	}
	l := log.G(ctx).WithFields(log.Fields{"op": "promote", "container_id": id, "sandbox_id": c.event.SandboxID, "duration_ms": time.Since(begin).Milliseconds()})
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		delete(p.candidates, id)
		switch {
		case r.Skipped != "":
			l.WithField("reason", r.Skipped).Debug("container not promoted")
		case r.Already:
			delete(p.resting, c.template)
			l.WithField("checkpoint_id", r.CheckpointID).Debug("there is a template already")
		default:
			delete(p.resting, c.template)
			l.WithFields(log.Fields{"checkpoint_id": r.CheckpointID, "size_bytes": r.SizeBytes}).Info("container became template " + c.template.name)
		}
		return
	}
	failed := p.resting[c.template]
	failed.failures++
	pause := min(promoteBackoff<<min(failed.failures-1, 10), promoteMaxBackoff)
	failed.until = time.Now().Add(pause)
	p.resting[c.template] = failed
	c.failures++
	c.due = failed.until
	next := fmt.Sprintf("again in %v", pause)
	if c.failures >= promoteAttempts {
		delete(p.candidates, id)
		next = "given up"
	}
	e := c.event
	e.ReasonCode = "internal"
	switch {
	case errdefs.IsUnavailable(err):
		e.ReasonCode = "busy"
	case errdefs.IsDeadlineExceeded(err):
		e.ReasonCode = "timeout"
	case errdefs.IsResourceExhausted(err):
		e.ReasonCode = "no-space"
	}
	e.Reason = fmt.Sprintf("template %s, attempt %d of %d, %s: %s", c.template.name, c.failures, promoteAttempts, next, truncate(err.Error(), maxReason))
	p.later(job{events: []event.Event{e}})
}

// askShim asks the container's shim to promote it.
func askShim(state string) func(context.Context, string) (control.Promotion, error) {
	return func(ctx context.Context, id string) (control.Promotion, error) {
		all, err := reboot.Find(ctx, state)
		if err != nil {
			return control.Promotion{}, err
		}
		for _, c := range all {
			if c.ID == id {
				return c.Promote(ctx)
			}
		}
		return control.Promotion{Skipped: "it is gone, or did not opt in"}, nil
	}
}

// PostStartContainer implements stub.PostStartContainerInterface.
func (c *connection) PostStartContainer(_ context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	defer c.metrics.request("PostStartContainer")()
	if c.promoter != nil {
		c.promoter.started(pod, ctr)
	}
	return nil
}
