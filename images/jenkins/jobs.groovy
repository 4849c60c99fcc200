// Made by `python -m airloom.stack.jenkins` from the folders of gitbucket_repos: change that, not this.

pipelineJob('de_datapreprocessing') {
  description('Builds what is pushed to airloom/de_datapreprocessing with `airloom build`, and says on the commit how it went.')
  properties {
    pipelineTriggers {
      triggers {
        genericTrigger {
          genericVariables {
            genericVariable {
              key('push_repository')
              value('$.repository.full_name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_ref')
              value('$.ref')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_after')
              value('$.after')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_user')
              value('$.pusher.name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
          }
          genericRequestVariables { }
          genericHeaderVariables {
            genericHeaderVariable {
              key('X-GitHub-Event')
              regexpFilter('')
            }
            genericHeaderVariable {
              key('X-GitHub-Delivery')
              regexpFilter('')
            }
          }
          causeString('$push_user pushed $push_after')
          tokenCredentialId('airloom-hook-token')
          printContributedVariables(false)
          printPostContent(false)
          regexpFilterText('$push_repository $x_github_event $push_ref $push_after')
          regexpFilterExpression('^airloom/de_datapreprocessing push refs/heads/main (?!0{40}$)[0-9a-f]{40}$')
        }
      }
    }
  }
  definition {
    cpsScm {
      scm {
        git {
          remote {
            url('http://git:8081/git/airloom/de_datapreprocessing.git')
            credentials('airloom-git')
          }
          branch('refs/heads/main')
        }
      }
      scriptPath('Jenkinsfile')
      lightweight(false)
    }
  }
}

pipelineJob('ds_mlmodeling') {
  description('Builds what is pushed to airloom/ds_mlmodeling with `airloom build`, and says on the commit how it went.')
  properties {
    pipelineTriggers {
      triggers {
        genericTrigger {
          genericVariables {
            genericVariable {
              key('push_repository')
              value('$.repository.full_name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_ref')
              value('$.ref')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_after')
              value('$.after')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_user')
              value('$.pusher.name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
          }
          genericRequestVariables { }
          genericHeaderVariables {
            genericHeaderVariable {
              key('X-GitHub-Event')
              regexpFilter('')
            }
            genericHeaderVariable {
              key('X-GitHub-Delivery')
              regexpFilter('')
            }
          }
          causeString('$push_user pushed $push_after')
          tokenCredentialId('airloom-hook-token')
          printContributedVariables(false)
          printPostContent(false)
          regexpFilterText('$push_repository $x_github_event $push_ref $push_after')
          regexpFilterExpression('^airloom/ds_mlmodeling push refs/heads/main (?!0{40}$)[0-9a-f]{40}$')
        }
      }
    }
  }
  definition {
    cpsScm {
      scm {
        git {
          remote {
            url('http://git:8081/git/airloom/ds_mlmodeling.git')
            credentials('airloom-git')
          }
          branch('refs/heads/main')
        }
      }
      scriptPath('Jenkinsfile')
      lightweight(false)
    }
  }
}

pipelineJob('ds_modelserving') {
  description('Builds what is pushed to airloom/ds_modelserving with `airloom build`, and says on the commit how it went.')
  properties {
    pipelineTriggers {
      triggers {
        genericTrigger {
          genericVariables {
            genericVariable {
              key('push_repository')
              value('$.repository.full_name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_ref')
              value('$.ref')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_after')
              value('$.after')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
            genericVariable {
              key('push_user')
              value('$.pusher.name')
              expressionType('JSONPath')
              regexpFilter('')
              defaultValue('')
            }
          }
          genericRequestVariables { }
          genericHeaderVariables {
            genericHeaderVariable {
              key('X-GitHub-Event')
              regexpFilter('')
            }
            genericHeaderVariable {
              key('X-GitHub-Delivery')
              regexpFilter('')
            }
          }
          causeString('$push_user pushed $push_after')
          tokenCredentialId('airloom-hook-token')
          printContributedVariables(false)
          printPostContent(false)
          regexpFilterText('$push_repository $x_github_event $push_ref $push_after')
          regexpFilterExpression('^airloom/ds_modelserving push refs/heads/main (?!0{40}$)[0-9a-f]{40}$')
        }
      }
    }
  }
  definition {
    cpsScm {
      scm {
        git {
          remote {
            url('http://git:8081/git/airloom/ds_modelserving.git')
            credentials('airloom-git')
          }
          branch('refs/heads/main')
        }
      }
      scriptPath('Jenkinsfile')
      lightweight(false)
    }
  }
}
