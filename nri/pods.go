package nri

import (
	"cmp"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// deadAfter is how long a pod must be gone before its checkpoints are dead: the
// kubelet may remove the sandbox of a pod and make the next one a little later.
const deadAfter = time.Hour

// maxGone bounds the memory of pods that are gone.
const maxGone = 10000

// pods knows which pods live, and which were seen to go. A pod that is merely
// unknown is not dead: after a reboot none is known yet.
type pods struct {
	now func() time.Time

	mu   sync.Mutex                // guards what follows
	live map[string]sandbox        // by sandbox ID
	gone map[string]time.Time      // by pod UID
	told map[string]map[string]int // by sandbox ID: reasons of ignored annotations
}

type sandbox struct{ uid string }

// bySandbox finds the pods of the runtime's list by sandbox ID.
func bySandbox(list []*api.PodSandbox) map[string]*api.PodSandbox {
	found := make(map[string]*api.PodSandbox, len(list))
	for _, p := range list {
		found[p.GetId()] = p
	}
	return found
}

// identityOf is the identity of a pod's container: its key is the pod's UID
// unless the settings have one. It is not validated.
func identityOf(pod *api.PodSandbox, container string, s checkpoint.Settings) checkpoint.Identity {
	return checkpoint.Identity{Namespace: pod.GetNamespace(), Key: cmp.Or(s.Key, pod.GetUid()), Container: container}
}

func newPods() *pods {
	return &pods{now: time.Now, live: map[string]sandbox{}, gone: map[string]time.Time{}, told: map[string]map[string]int{}}
}

// replace takes the runtime's list. Pods that went while nobody looked count as
// seen to go, from now on.
func (p *pods) replace(list []*api.PodSandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.live
	p.live = make(map[string]sandbox, len(list))
	for _, s := range list {
		p.live[s.GetId()] = sandbox{s.GetUid()}
		delete(p.gone, s.GetUid())
	}
	for id, s := range old {
		if _, ok := p.live[id]; !ok {
			p.forget(id, s.uid)
		}
	}
}

func (p *pods) add(s *api.PodSandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.live[s.GetId()] = sandbox{s.GetUid()}
	delete(p.gone, s.GetUid())
}

func (p *pods) remove(s *api.PodSandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.live, s.GetId())
	p.forget(s.GetId(), s.GetUid())
}

// forget notes that a sandbox is gone; p.mu is held.
func (p *pods) forget(id, uid string) {
	delete(p.told, id)
	for _, s := range p.live {
		if s.uid == uid {
			return
		}
	}
	if len(p.gone) < maxGone { // beyond it, the TTL does the work
		p.gone[uid] = p.now()
	}
}

// dead reports whether the pod was seen to go a while ago and has not come back.
func (p *pods) dead(uid string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	t, ok := p.gone[uid]
	return ok && p.now().Sub(t) >= deadAfter
}

// prune forgets pods that have been dead for so long that their checkpoints
// are removed. The caller has just done that.
func (p *pods) prune() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid, t := range p.gone {
		if p.now().Sub(t) >= 2*deadAfter {
			delete(p.gone, uid)
		}
	}
}

func (p *pods) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.live)
}

// firstTold drops the events about ignored annotations that the pod's log holds
// already: every container of a pod meets the same ones, at each restart.
func (p *pods) firstTold(sandboxID string, events []event.Event) []event.Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	var fresh []event.Event
	for _, e := range events {
		if e.Type == event.Ignored {
			if _, live := p.live[sandboxID]; live { // or nobody would forget it again
				told := p.told[sandboxID]
				if told == nil {
					told = map[string]int{}
					p.told[sandboxID] = told
				}
				if told[e.Reason]++; told[e.Reason] > 1 {
					continue
				}
			}
		}
		fresh = append(fresh, e)
	}
	return fresh
}
